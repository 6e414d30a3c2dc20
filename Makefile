.PHONY: test lint types format ci

test:
	pytest

lint:
	ruff check . && ruff format --check .

types:
	pyright src

format:
	ruff check --fix . && ruff format . && python -m autopipeline.stub

ci:
	.ci/run
