# `make demo` and `make test` do everything: they set up what is missing, then run.

VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin

.PHONY: setup demo test lint clean

setup:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" ./scripts/setup.sh

demo: setup
	@$(RUN)/flashvla demo

# Two files at a time; then those of ROS, which know deadlines, alone.
test: setup
	@failed=0; \
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadfile --ignore test/flashvla_ros || failed=1; \
	$(RUN)/python -m pytest test/flashvla_ros || failed=1; \
	exit $$failed

lint: setup
	@$(RUN)/ruff check .
	@$(RUN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info runs
