"""The torch side: executes a Plan. `prepare` runs once a node before any rank exists, `__main__` is what a rank runs."""
