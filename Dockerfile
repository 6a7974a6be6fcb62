# The server alone: no training, no attacks. CPU by default; docs/deployment.md tells how to build and run it.
FROM python:3.11-slim AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# An index with torch for the processor that the server shall use; its `+cpu` comes before the plain version.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# A folder with wheels of your own, mounted while building; pip reads the variable itself.
ARG PIP_FIND_LINKS

# Without pip inside: nothing is installed into it later.
RUN python -m venv --without-pip /opt/pathguard

# Dependencies first: they change less often than the code, and are kept in a layer of their own.
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY pathguard/version.py pathguard/version.py
RUN pip --python /opt/pathguard/bin/python install --no-cache-dir --disable-pip-version-check \
        --extra-index-url "${TORCH_INDEX}" -c constraints.txt ".[onnx]" \
    && pip --python /opt/pathguard/bin/python uninstall --yes pathguard \
    && rm -rf /opt/pathguard/lib/python3.11/site-packages/torch/include \
        /opt/pathguard/lib/python3.11/site-packages/torch/test
# To pip an index that cannot be reached is only a warning, and it takes gigabytes of CUDA libraries instead.
RUN case "${TORCH_INDEX}" in */cpu) pip --python /opt/pathguard/bin/python show torch | grep '^Version: .*+cpu$' ;; esac

# For the engine that skips closed filters (detector/engines/kernel.c); the compiler stays behind in this stage, and any
# version of it will do.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

COPY pathguard pathguard
COPY service service
COPY detector detector
COPY protos protos
RUN pip --python /opt/pathguard/bin/python install --no-cache-dir --disable-pip-version-check --no-deps . \
    && /opt/pathguard/bin/python -I -c "import service.server, detector.scoring, pathguard.cli; \
        from detector.engines.library import library; library()"


FROM python:3.11-slim

# No program of the base may give its caller more rights.
RUN groupadd --gid 10001 pathguard \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --shell /usr/sbin/nologin pathguard \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY --from=build /opt/pathguard /opt/pathguard

# Nothing is written at run time, so that the root may be read-only, and nothing is started through a shell. Inside the
# container the server must listen on all addresses; who reaches it is decided where its port is published.
ENV PATH=/opt/pathguard/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PATHGUARD_BUNDLE=/bundle \
    PATHGUARD_HOST=0.0.0.0 \
    PATHGUARD_ALLOW_INSECURE=1

USER 10001:10001
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["pathguard", "health"]
ENTRYPOINT ["pathguard"]
CMD ["serve"]
