# docker build -t vae .
# docker run --gpus all -v "$PWD/runs:/app/runs" vae experiment=quickstart trainer.accelerator=gpu
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --shell /bin/bash trainer \
    && mkdir /app \
    && chown trainer /app

USER trainer
WORKDIR /app

# The dependencies first: they change less often than the code.
COPY --chown=trainer pyproject.toml README.md Makefile ./
COPY --chown=trainer vae/__init__.py vae/__init__.py
RUN make .venv/installed

COPY --chown=trainer . .
# Made as trainer, so that a fresh volume belongs to it; for a mounted folder add --user "$(id -u)".
RUN mkdir -p runs
VOLUME /app/runs
ENTRYPOINT [".venv/bin/python", "train.py"]
CMD ["experiment=quickstart"]
