# docker build -t cryptoml .                               for a CPU
# docker build -t cryptoml:gpu --build-arg DEVICE=gpu .    for an NVIDIA GPU; run it with --gpus all
# docker run --rm -v cryptoml:/state cryptoml              the doctor
# docker run --rm -v cryptoml:/state cryptoml train --epochs 10
# docker run -v cryptoml:/state cryptoml live --exchange binance --paper --state runs/train/NAME/model
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim-bookworm
ARG DEVICE=cpu
ARG EXTRAS=jobs,exchange
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# LightGBM's threads
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1=12.* \
 && rm -rf /var/lib/apt/lists/*
# torch apart, since it is most of the image: PyPI's wheel brings CUDA, the index of its makers has one without
COPY constraints.txt /tmp/
# The pin stands in constraints.txt, where hadolint does not look
# hadolint ignore=DL3013
RUN case "$DEVICE" in \
      cpu) set -- --index-url https://download.pytorch.org/whl/cpu ;; \
      gpu) set -- ;; \
      *) echo "DEVICE is cpu or gpu, not $DEVICE" >&2; exit 1 ;; \
    esac \
 && pip install "$@" "$(grep '^torch==' /tmp/constraints.txt)"
COPY --from=wheel /wheels/ /tmp/wheels/
RUN pip install --constraint /tmp/constraints.txt "$(echo /tmp/wheels/cryptoml-*.whl)[$EXTRAS]" \
 && rm -r /tmp/wheels /tmp/constraints.txt \
 && useradd --uid 1000 --create-home --shell /usr/sbin/nologin cryptoml \
 && install --directory --owner 1000 /state
# What must outlast the container: models, runs, the ledger of trials, compiled features
USER 1000
WORKDIR /state
VOLUME /state
ENV CRYPTOML_CACHE=/state/.cache CRYPTOML_LEDGER=/state/ledger.jsonl MPLCONFIGDIR=/tmp/matplotlib
HEALTHCHECK --interval=10m --timeout=2m --start-period=2m CMD ["cryptoml", "doctor"]
ENTRYPOINT ["cryptoml"]
CMD ["doctor"]
