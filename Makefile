# The verbs of development; .ci/run calls the same ones.
.PHONY: install lint types test check bench schema

install:            ## the product and what its tests need
	pip install -e '.[test]'

lint:               ## style and layout of every file
	ruff check .
	ruff format --check .

types:              ## the control side, strictly
	mypy

test:               ## everything that is tested
	pytest

check: lint types test

bench:              ## the results pages of this machine
	python benchmarks/startup.py
	python benchmarks/trainer_overhead.py
	python benchmarks/remote_code_race.py
	# python benchmarks/one_sample.py --data DIR, with alpaca_zh_demo.json and alpaca_en_demo.json
	python benchmarks/loading_memory.py
	python benchmarks/memory_honesty.py
	python benchmarks/pipeline.py
	python benchmarks/scaling.py
	# python benchmarks/{memory_balance,data_prep,throughput_vs_peers,startup_vs_peers}.py --data alpaca_en_demo.json [--environments DIR]
	# python benchmarks/gpu_step.py, on a machine with a card
	python benchmarks/device_maps.py
	python benchmarks/checkpoint_stall.py
	# python benchmarks/chaos.py, which takes an hour or more
	python benchmarks/many_nodes.py

schema:             ## what editors complete recipes with
	launch schema recipes/schema.json
	launch schema docs/recipe.md
