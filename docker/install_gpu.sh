#!/usr/bin/env bash
# Build the optional packages that compile against CUDA, into the environment of `python`: see docs/install.md.
#
#   docker/install_gpu.sh [megablocks] [flash2] [flash3]     default: megablocks flash2, and flash3 where 9.0 is among the architectures
#
# PYTHON               the interpreter                                               default: python
# TORCH_CUDA_ARCH_LIST compute capabilities, as torch takes them ("8.0;9.0")          default: those of the GPUs here
# MAX_JOBS             compilers at a time                                            default: by cores and free memory
#
# They pin other versions of torch, so each is installed without dependencies and without build isolation: the torch that is here stays.
set -euo pipefail

readonly TORCH=2.13 # major.minor
readonly MEGABLOCKS=0.10.0 STANFORD_STK=0.7.1 GROUPED_GEMM=0.3.0 FLASH2=2.8.3.post2
readonly FLASH3=0251105a2fb19d2957484b7f023cd8c115286ced # flash-attn 3 has no release on PyPI: a commit of its repository
readonly BUILD_TOOLS=(setuptools wheel packaging ninja psutil einops numpy)
readonly DISK_GB=20       # of temporary files
readonly MEMORY_PER_JOB=6 # GB that one nvcc of flash-attn takes

PYTHON=${PYTHON:-python}

fail() {
    echo "install_gpu.sh: $*" >&2
    exit 1
}

ask_torch() { # an expression of torch
    "$PYTHON" -c "import torch; print($1)"
}

check_torch() {
    local found
    found=$(ask_torch torch.__version__ 2>/dev/null) || fail "$PYTHON has no torch; install torch $TORCH for CUDA first: docs/install.md"
    [[ $found == "$TORCH".* ]] || fail "torch is $found; these versions were chosen for torch $TORCH: install that, or change the pins here"
    CUDA=$(ask_torch "torch.version.cuda or ''")
    [[ -n $CUDA ]] || fail "torch $found was built without CUDA; install one of https://download.pytorch.org/whl that has it"
}

check_nvcc() {
    local nvcc found
    nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
    command -v "$nvcc" >/dev/null || fail "$nvcc was not found; install the CUDA $CUDA toolkit and set CUDA_HOME"
    found=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
    [[ ${found%%.*} == "${CUDA%%.*}" ]] || fail "nvcc is of CUDA $found, and torch was built for CUDA $CUDA; set CUDA_HOME to a ${CUDA%%.*}.x"
}

choose_architectures() {
    if [[ -z ${TORCH_CUDA_ARCH_LIST:-} ]]; then
        TORCH_CUDA_ARCH_LIST=$(ask_torch "';'.join(sorted({'%d.%d' % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}))")
        [[ -n $TORCH_CUDA_ARCH_LIST ]] || fail 'no GPU is here to ask; set TORCH_CUDA_ARCH_LIST (A100: 8.0, H100 and H200: 9.0, both: "8.0;9.0")'
    fi
    local architecture
    for architecture in ${TORCH_CUDA_ARCH_LIST//[; ]/ }; do
        [[ $architecture =~ ^(8|9|10|12)\.[0-9]a?$ ]] || fail "TORCH_CUDA_ARCH_LIST=$TORCH_CUDA_ARCH_LIST: $architecture is not a capability of 8.0 or more"
    done
    export TORCH_CUDA_ARCH_LIST
    FLASH_ATTN_CUDA_ARCHS=${TORCH_CUDA_ARCH_LIST//[.a]/} # flash-attn 2 has a list of its own: 80;90
    export FLASH_ATTN_CUDA_ARCHS=${FLASH_ATTN_CUDA_ARCHS// /;}
}

choose_jobs() {
    local free
    free=$(awk '/MemAvailable/ { print int($2 / 1048576) }' /proc/meminfo)
    ((free >= MEMORY_PER_JOB)) || fail "$free GB of memory are free; one compiler takes up to $MEMORY_PER_JOB GB"
    if [[ -z ${MAX_JOBS:-} ]]; then
        MAX_JOBS=$((free / MEMORY_PER_JOB < $(nproc) ? free / MEMORY_PER_JOB : $(nproc)))
    fi
    [[ $MAX_JOBS =~ ^[1-9][0-9]*$ ]] || fail "MAX_JOBS=$MAX_JOBS must be a number from 1"
    export MAX_JOBS NVCC_THREADS=1
}

check_disk() {
    local folder=${TMPDIR:-/tmp} free
    free=$(df --output=avail --block-size=1G "$folder" | tail -n 1)
    ((free >= DISK_GB)) || fail "$folder has ${free// /} GB left and builds need $DISK_GB; set TMPDIR to a larger disk"
}

build() { # what pip installs
    echo "install_gpu.sh: building $* (MAX_JOBS=$MAX_JOBS)"
    "$PYTHON" -m pip install --no-deps --no-build-isolation "$@" || fail "$* was not built; the reason stands above"
}

check_import() { # a module, and what must be in it
    "$PYTHON" -c "import importlib; assert importlib.import_module('$1').$2" || fail "$1 was built and cannot be imported"
    echo "install_gpu.sh: $1 is ready"
}

install_megablocks() {
    build "stanford-stk==$STANFORD_STK"
    GROUPED_GEMM_CUTLASS=1 build "grouped_gemm==$GROUPED_GEMM" # one kernel for all groups, whose sizes stay on the device
    build "megablocks==$MEGABLOCKS"
    check_import grouped_gemm backend.gmm
    check_import megablocks.grouped_gemm_util backend.gmm
}

install_flash2() {
    build "flash-attn==$FLASH2"
    check_import flash_attn flash_attn_varlen_func
}

install_flash3() {
    [[ $TORCH_CUDA_ARCH_LIST == *9.0* ]] || fail "flash3 is for Hopper, and TORCH_CUDA_ARCH_LIST=$TORCH_CUDA_ARCH_LIST has no 9.0"
    build "flash_attn_3 @ git+https://github.com/Dao-AILab/flash-attention@$FLASH3#subdirectory=hopper"
    check_import flash_attn_3.flash_attn_interface flash_attn_varlen_func
}

main() {
    local part
    for part in "$@"; do
        [[ $part =~ ^(megablocks|flash2|flash3)$ ]] || fail "$part is unknown: megablocks, flash2 and flash3 can be installed"
    done
    check_torch
    check_nvcc
    choose_architectures
    choose_jobs
    check_disk
    if (($# == 0)); then
        set -- megablocks flash2
        [[ $TORCH_CUDA_ARCH_LIST != *9.0* ]] || set -- "$@" flash3
    fi
    "$PYTHON" -m pip install "${BUILD_TOOLS[@]}"
    for part in "$@"; do
        "install_$part"
    done
    [[ $(ask_torch torch.__version__) == "$TORCH".* ]] || fail "another torch was installed in the meantime"
}

main "$@"
