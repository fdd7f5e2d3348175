"""What people would pick instead, made to run here: environments of their own (`environments`), one task for all (`task`), each one's
settings (`systems`), and a probe that measures them from inside (`probe/sitecustomize.py`)."""
