# make demo   a tour on a small synthetic checkpoint
# make test   everything that continuous integration checks
# Both set up .venv by themselves; the second run starts at once.

BASE := .venv/installed-base
DEV := .venv/installed-dev
SETUP := pyproject.toml setup.py constraints.txt tools/setup.sh gptoss_convert/codecs/mxfp4/kernels.c

.PHONY: help demo test lint format wheel bench clean

help:
	@sed -n 's/^# make /make /p' Makefile

demo: $(BASE)
	@tools/demo.sh

# make lint   ruff and pyright alone
lint: $(DEV)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright

test: lint
	.venv/bin/pytest -n auto --dist loadfile --no-loadscope-reorder

# make format   rewrite the sources as ruff formats them
format: $(DEV)
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

# make wheel   build the wheel and try it in an environment of its own
wheel: $(DEV)
	tools/check_wheel.sh

# make bench   speed against this machine's limits, minutes; OPTIONS=-h lists the options
bench: $(DEV)
	.venv/bin/python -m benchmarks.bench $(OPTIONS)

# make clean   remove what the other targets made
clean:
	rm -rf .venv demo build dist

$(BASE): $(SETUP)
	@tools/setup.sh base

$(DEV): $(SETUP)
	@tools/setup.sh dev
