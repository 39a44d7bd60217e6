# docker build -t vae .
# mkdir -p runs    # else the engine makes it, for root alone
# docker run --gpus all --ipc=host --user "$(id -u)" -v "$PWD/runs:/app/runs" vae experiment=quickstart trainer.accelerator=gpu
# With the engine's 64 MB of shared memory, instead of the host's, the workers that decode images would not get far.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# Ubuntu keeps one version of a package, so a pinned one would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --shell /bin/bash trainer \
    && mkdir /app \
    && chown trainer /app

# hadolint ignore=DL3066
USER trainer
WORKDIR /app

# The dependencies first: they change less often than the code.
COPY --chown=trainer pyproject.toml README.md Makefile ./
COPY --chown=trainer vae/__init__.py vae/__init__.py
COPY --chown=trainer configs configs
RUN make .venv/installed

COPY --chown=trainer . .
# Made as trainer, so that a fresh volume belongs to it.
RUN mkdir -p runs
VOLUME /app/runs
ENTRYPOINT [".venv/bin/python", "train.py"]
CMD ["experiment=quickstart"]
