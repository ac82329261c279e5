#!/usr/bin/env bash
# Makes an environment with the peers of the benchmarks, by name from PyPI.
#   benchmarks/install_peers.sh FOLDER [kernels | fastllm]
# FOLDER/bin/python then is what `bench_generate --chatglm-cpp` takes. With `kernels` also the
# packages of single kernels (several hundred MB); run bench_kernels with that same Python. With
# `fastllm` that peer alone, a wheel of 216 MB: FOLDER/bin/python is what `--fastllm` takes.
set -euo pipefail

readonly VERSION=0.4.2
readonly FASTLLM_VERSION=1.9.0
readonly FOLDER=${1:?usage: install_peers.sh FOLDER [kernels | fastllm]}
readonly PYTHON=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
readonly root

"$PYTHON" -m venv "$FOLDER"
pip=$(cd "$FOLDER" && pwd)/bin/pip
readonly pip
if [ "${2:-}" = fastllm ]; then
    # Without what its wheel asks for beside these: CUDA, and the pages of its web server.
    "$pip" install --quiet --no-deps "ftllm==$FASTLLM_VERSION"
    "$pip" install --quiet numpy pillow requests transformers psutil
    echo "$FOLDER/bin/python"
    exit
fi
work=$(mktemp -d)
readonly work
trap 'rm -rf "$work"' EXIT

# The source: the wheel of PyPI is built for the least of all processors.
"$pip" install --quiet "setuptools<81" wheel
"$pip" download --quiet --no-deps --no-build-isolation --no-binary :all: \
    "chatglm-cpp==$VERSION" --dest "$work"
tar -xzf "$work"/*.tar.gz -C "$work"
cd "$work"/chatglm*cpp-"$VERSION"
# Its build file names a test that the source package lacks.
mkdir -p tests
[ -e tests/perplexity.cpp ] || echo 'int main() {}' >tests/perplexity.cpp

flags="-DGGML_CUDA=OFF"
has() { grep -qw "$1" /proc/cpuinfo 2>/dev/null; }
if has avx512f; then flags="$flags -DGGML_AVX512=ON"; fi
if has avx512_vbmi; then flags="$flags -DGGML_AVX512_VBMI=ON"; fi
if has avx512_vnni; then flags="$flags -DGGML_AVX512_VNNI=ON"; fi
CFLAGS=-march=native CXXFLAGS=-march=native CMAKE_ARGS="$flags" \
    "$pip" install --no-build-isolation --no-deps .

if [ "${2:-}" = kernels ]; then
    "$pip" install "$root" onnxruntime onnx openvino bitsandbytes
fi
echo "$FOLDER/bin/python"
