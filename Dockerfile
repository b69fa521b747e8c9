# Forebay on CPU: server and gateway, no torch.
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./
RUN pip install --no-cache-dir -c constraints.txt uv
COPY protos protos
COPY tools tools
COPY contract contract
COPY server server
COPY gateway gateway
COPY exporters exporters
COPY cli cli
RUN uv venv /opt/forebay \
 && uv pip install --no-cache --python /opt/forebay/bin/python -c constraints.txt ".[up,postgres,redis,otel]" pip

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 forebay
COPY --from=build /opt/forebay /opt/forebay
ENV PATH=/opt/forebay/bin:$PATH \
    FOREBAY_HOME=/data \
    FOREBAY_GRPC__HOST=0.0.0.0 \
    FOREBAY_HTTP__HOST=0.0.0.0
# With the folders that may be volumes of their own: a new one that is mounted there takes its owner over.
RUN mkdir -p /data/models /data/files /data/knowledge && chown -R forebay /data
# By number: Kubernetes' runAsNonRoot cannot see that a name is not root's.
USER 10001
VOLUME /data
EXPOSE 50051 8080
HEALTHCHECK --start-period=180s CMD ["forebay", "health"]
# Beyond loopback keys are asked for: `docker exec ... forebay keys create NAME` makes the first.
CMD ["forebay", "up"]
