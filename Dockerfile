# syntax=docker/dockerfile:1
# Two images of the deploy side (inspect, build, bench, doctor; no PyTorch):
#   docker build --target cpu -t sparsify-deploy:cpu .     OpenVINO and ONNX Runtime
#   docker build --target gpu -t sparsify-deploy:gpu .     TensorRT, the one inside NVIDIA's container
#   docker run --rm -v "$PWD:/data" sparsify-deploy:cpu inspect model.onnx
# Checked with hadolint, not built: no container engine on the machine where this was written.

FROM python:3.12.12-slim-bookworm AS install
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY sparsify_deploy sparsify_deploy
# --target and not a venv: the gpu image has another path to its Python 3.12, which the script must find by name.
RUN pip install --no-cache-dir --target /opt/cpu -c constraints/py312.txt '.[cpu]' \
    && pip install --no-cache-dir --target /opt/gpu -c constraints/py312.txt . cuda-bindings nvidia-ml-py \
    && sed -i '1s|.*|#!/usr/bin/env python3|' /opt/cpu/bin/sparsify-deploy /opt/gpu/bin/sparsify-deploy

FROM nvcr.io/nvidia/tensorrt:25.10-py3 AS gpu
COPY --from=install /opt/gpu /opt/sparsify-deploy
ENV PATH=/opt/sparsify-deploy/bin:$PATH \
    PYTHONPATH=/opt/sparsify-deploy \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp
# The packages were installed for 3.12, and TensorRT's Python module must be the container's own.
RUN python3 -c 'import importlib.util as u, sys; assert sys.version_info[:2] == (3, 12); assert u.find_spec("tensorrt")' \
    && sparsify-deploy --version
WORKDIR /data
USER 10001:10001
ENTRYPOINT ["sparsify-deploy"]
CMD ["--help"]

FROM python:3.12.12-slim-bookworm AS cpu
COPY --from=install /opt/cpu /opt/sparsify-deploy
ENV PATH=/opt/sparsify-deploy/bin:$PATH \
    PYTHONPATH=/opt/sparsify-deploy \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp
RUN sparsify-deploy --version
WORKDIR /data
USER 10001:10001
ENTRYPOINT ["sparsify-deploy"]
CMD ["--help"]
