# The server alone: no training, no attacks. CPU by default; see README.md for the `docker run` line.
FROM python:3.11-slim AS build

# An index with torch for the processor that the server shall use; its `+cpu` comes before the plain version.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /source
RUN python -m venv /opt/pathguard
ENV PATH=/opt/pathguard/bin:$PATH

# Dependencies first: they change less often than the code, and are kept in a layer of their own.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY pathguard/version.py pathguard/version.py
RUN pip install --no-cache-dir --disable-pip-version-check --extra-index-url "${TORCH_INDEX}" \
        -c constraints.txt ".[serve]" \
    && pip uninstall --yes pathguard
# To pip an index that cannot be reached is only a warning, and it takes gigabytes of CUDA libraries instead.
RUN case "${TORCH_INDEX}" in */cpu) pip show torch | grep '^Version: .*+cpu$' ;; esac

COPY pathguard pathguard
COPY service service
COPY detector detector
COPY protos protos
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps . \
    && python -c "import service.server, detector.scoring, pathguard.cli"


FROM python:3.11-slim

RUN groupadd --gid 10001 pathguard \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --shell /usr/sbin/nologin pathguard
COPY --from=build /opt/pathguard /opt/pathguard

# Nothing is written at run time, so that the root may be read-only. Inside the container the server must listen on
# all addresses; who reaches it is decided where its port is published.
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
