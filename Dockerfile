# The image is what `make install` makes: build it without Docker by running the same target.
#   docker build -t understudy .                          CPU
#   docker build -t understudy --build-arg EXTRAS=cuda .  CPU and NVIDIA GPUs (run with --gpus all)
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG EXTRAS=
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev make && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN make install DEST=/opt/understudy EXTRAS=${EXTRAS}
# The gateway, with the console in it; Go and Node.js come from PyPI where the image has none.
RUN make console gateway && install -D build/gateway/understudy-gateway /opt/understudy/bin/understudy-gateway

FROM python:${PYTHON}-slim-bookworm
# No telemetry: ONNX Runtime's wheels send it unless this is set before the first import.
ENV ORT_DISABLE_TELEMETRY=1 HF_HUB_DISABLE_TELEMETRY=1 PYTHONUNBUFFERED=1 PATH=/opt/understudy/venv/bin:/opt/understudy/bin:$PATH
RUN useradd --system --uid 10001 --create-home understudy && install -d -o understudy /var/lib/understudy
COPY --from=build /opt/understudy/venv /opt/understudy/venv
COPY --from=build /opt/understudy/bin /opt/understudy/bin
COPY --from=build --chown=understudy /opt/understudy/models /var/lib/understudy/models
USER understudy
WORKDIR /var/lib/understudy
# The gateway is the same image with another command: docker run --entrypoint understudy-gateway understudy --server HOST:50051 --listen :8080
EXPOSE 50051 9464 8080 9091
VOLUME ["/var/lib/understudy"]
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD ["understudy", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["understudy"]
CMD ["serve", "--host", "0.0.0.0"]
