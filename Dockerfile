# The command msad with the engine lite, pretrained backbones and ONNX; docs/INSTALL.md says how to use it.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
# torch's own index of CPU-only builds makes the image several GB smaller.
ARG TORCH_INDEX=""
RUN apt-get update \
    && apt-get install -y --no-install-recommends make libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/msad
COPY . .
# Compiled here, because containers may not write there; files of packages that are for another Python are left out.
RUN make install VENV=/opt/venv EXTRAS=pretrained,onnx,fast-eval TORCH_INDEX="${TORCH_INDEX}" \
    && (/opt/venv/bin/python -m compileall -q -j 0 /opt/venv/lib > /dev/null || true) \
    && rm -rf /root/.cache
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["msad"]
