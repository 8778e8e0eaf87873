#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA GPU, nvcc and a CUDA torch, and without a network.
set -euo pipefail

usage() {
  cat <<'END'
usage: benchmarks/on_gpu.sh ARCHIVES RESULTS [STEP ...]

Builds, tests and measures sparkme on a machine with an NVIDIA GPU, nvcc and a CUDA torch. It needs no network.

  ARCHIVES  folder with wheels of Python packages that the machine lacks; MinkowskiEngine-0.5.4.tar.gz, or a wheel of it; and,
            if there are any, minkowski-cache.tar and operators.tar of an earlier call, which save the compilation
  RESULTS   folder for what comes out: log.txt, a JSON file of each step that times, profiles, and the two archives
  STEP      of these, in this order whatever the order of the words (all but the last four):
    setup      versions, driver, GPU; installs ARCHIVES/*.whl; names packages that are missing
    minkowski  compiles MinkowskiEngine, or takes what is there, and compares it with dense convolutions
    operators  compiles sparkme's operators, in place, or takes them from operators.tar
    tests      the tests that use a GPU
    resnet50   times ResNet-50's encoder, and the share of time in which the GPU waits for the host
    convnext   the same of ConvNeXt-B
    step       times the whole training step of both, eager
    graph      encoder and step of both from CUDA graphs
    compile    ResNet-50's encoder and step compiled by torch.compile
    profile    the most expensive kernels of encoder and step
    minkowski-time  ResNet-50's encoder in float32 with MinkowskiEngine
    sweep      times the encoder over the mask ratio

A step takes at most as long as `LIMITS` below says, and steps can be called one at a time: the ones before them have left what
they need in WORK. With both archives and the wheels, setup to resnet50 take about four minutes on an H200.

Variables:
  PYTHON     the interpreter (python3)
  WORK       folder for packages and builds (${TMPDIR:-/tmp}/sparkme-gpu)
  PROCESSES  that run tests (one a core, at most 15)
  LIMIT      seconds for everything; later steps are cut or left out (3600)
  DRY_RUN=1  tiny sizes and builds for the CPU, to try the script where there is no GPU

Every step prints one line; its output is in log.txt. A step that fails does not stop those that do not need it. The exit
code is 0 if all went well, else 1.
END
}

ALL_STEPS="setup minkowski operators tests resnet50 convnext step graph compile profile minkowski-time sweep"
USUAL_STEPS="setup minkowski operators tests resnet50 convnext step graph"
# Seconds after which a step is ended.
LIMITS="setup=60 minkowski=400 operators=300 tests=200 resnet50=150 convnext=200 step=200 graph=200 compile=400 profile=150
minkowski-time=150 sweep=200"

step_limit() { printf '%s\n' $LIMITS | sed -n "s/^$1=//p"; }

run_setup() {
  shopt -s nullglob
  local wheels=("$ARCHIVES"/*.whl)
  if [ ${#wheels[@]} -gt 0 ]; then
    pip_install "${wheels[@]}"
  fi
  if [ -z "$DRY_RUN" ]; then
    nvidia-smi || echo "nvidia-smi does not run"
    nvcc --version || echo "nvcc is not on PATH: nothing can be compiled for CUDA"
  fi
  "$PYTHON" --version
  "$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "GPU", torch.cuda.is_available())'
  "$PYTHON" - <<'END'
import importlib.util
import sys

modules = {
    "torchvision": "torchvision", "numpy": "numpy", "PIL": "pillow", "tqdm": "tqdm", "timm": "timm", "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub", "yaml": "pyyaml", "matplotlib": "matplotlib", "pytest": "pytest",
    "pytest_timeout": "pytest-timeout", "xdist": "pytest-xdist", "setuptools": "setuptools", "wheel": "wheel", "ninja": "ninja",
}
missing = [package for module, package in modules.items() if importlib.util.find_spec(module) is None]
if missing:
    print("missing:", *missing, "- put their wheels into ARCHIVES:", "python3 -m pip download --only-binary=:all: --no-deps",
          f"--python-version {sys.version_info[0]}.{sys.version_info[1]} --dest ARCHIVES", *missing)
END
}

run_minkowski() {
  local kind=cuda wheel where='import MinkowskiEngine, pathlib; print(pathlib.Path(MinkowskiEngine.__file__).parents[1])'
  [ -z "$DRY_RUN" ] || kind=cpu
  if where=$("$PYTHON" -c "$where" 2>/dev/null); then
    "$PYTHON" -P cuda_ext/minkowski/self_check.py "$where" --expect $kind
    return
  fi
  if [ -f "$ARCHIVES/minkowski-cache.tar" ]; then
    mkdir -p "$WORK/cache"
    tar -xf "$ARCHIVES/minkowski-cache.tar" -C "$WORK/cache"
  fi
  if ! "$PYTHON" cuda_ext/minkowski/build.py --$kind --sdist "$ARCHIVES/MinkowskiEngine-0.5.4.tar.gz" --cache "$WORK/cache" \
    | tee "$WORK/minkowski.out"; then
    tail -n 40 "$WORK"/cache/*.log
    return 1
  fi
  wheel=$(tail -n 1 "$WORK/minkowski.out")
  case $wheel in
    *.whl) ;;
    *) wheel=$(sed -n 's/.*: from the cache, //p' "$WORK/minkowski.out" | tail -n 1)/*.whl ;;
  esac
  pip_install "$wheel"
  (cd "$WORK/cache" && tar -cf "$RESULTS/minkowski-cache.tar" --exclude='*.log' --exclude='*.lock' -- *)
}

run_operators() {
  local cuda=1
  if [ -z "$DRY_RUN" ]; then
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    export TORCH_CUDA_ARCH_LIST
  else
    cuda=0
  fi
  if [ -f "$ARCHIVES/operators.tar" ]; then
    tar -xf "$ARCHIVES/operators.tar"
  else
    FORCE_CUDA=$cuda "$PYTHON" setup.py build_ext --inplace
    strip --strip-debug sparkme/_C*.so
    tar -cf "$RESULTS/operators.tar" sparkme/_C*.so
  fi
  "$PYTHON" - <<END
from sparkme import ops

problem = ops.unavailable(on_gpu=bool($cuda))
raise SystemExit(f"the operators do not load: {problem}" if problem else 0)
END
}

run_tests() {
  local files=(tests/whole/test_ops_gpu.py tests/contracts/test_golden.py tests/contracts/test_cuda_graph.py tests/units/test_grid.py) processes=${PROCESSES:-$(nproc)}
  [ -z "$DRY_RUN" ] || files=(tests/units/test_grid.py)
  "$PYTHON" -m pytest -q -p no:cacheprovider --numprocesses $((processes > 15 ? 15 : processes)) "${files[@]}"
}

# throughput NAME OPTION ...: on both networks unless --model follows, or on a small one; the numbers go to NAME.json.
throughput() {
  local name=$1 sizes=(--model resnet50 convnext_base --batch-size 256 --precision bf16 --device cuda --seconds 25 --rounds 5)
  shift
  sizes+=("$@")
  if [ -n "$DRY_RUN" ]; then
    sizes+=(--model resnet18 --batch-size 4 --input-size 96 --decoder-width 32 --device cpu --rounds 1 --warmup 1)
  fi
  "$PYTHON" -m benchmarks.throughput "${sizes[@]}" --json "$RESULTS/$name.json"
}

# Options that need a GPU.
on_gpu_only() { [ -n "$DRY_RUN" ] || printf '%s\n' "$@"; }

DENSE=(cuda_ext masked-dense masked-dense-nchw)

run_resnet50() { throughput resnet50 --model resnet50 --what encoder --contenders "${DENSE[@]}" $(on_gpu_only --host-wait); }
run_convnext() { throughput convnext --model convnext_base --what encoder --contenders "${DENSE[@]}" $(on_gpu_only --host-wait); }
run_step() { throughput step --what step --contenders "${DENSE[@]:0:2}" $(on_gpu_only --host-wait); }
run_graph() { throughput graph --what encoder step --contenders "${DENSE[@]:0:2}" $(on_gpu_only --graph); }
run_compile() { throughput compile --model resnet50 --what encoder step --contenders "${DENSE[@]:0:2}" --compile; }
run_minkowski-time() { throughput minkowski-time --model resnet50 --what encoder --contenders cuda_ext minkowski --precision float32; }
run_sweep() { throughput sweep --sweep --contenders "${DENSE[@]}" --warmup 1; }

run_profile() {
  throughput profile --what encoder step --contenders "${DENSE[@]:0:2}" --rounds 1 --profile "$RESULTS/profile.txt"
  rm -f "$RESULTS/profile.json"
}

pip_install() {
  "$PYTHON" -m pip install --disable-pip-version-check --quiet --no-index --no-deps --upgrade --target "$WORK/site" "$@"
}

# What a step cannot do without, said in one line; nothing if it is there.
missing_for() {
  case $1 in
    setup | minkowski | operators) ;;
    *)
      if ! "$PYTHON" -c 'import MinkowskiEngine' >/dev/null 2>&1; then
        echo "MinkowskiEngine is not there: it needs the step minkowski"
      fi
      ;;
  esac
}

# The last megabyte of every step's output, in one file.
gather_logs() {
  local step
  for step in $ALL_STEPS; do
    if [ -f "$WORK/logs/$step" ]; then
      printf '==== %s\n' "$step"
      tail -c 1048576 "$WORK/logs/$step"
    fi
  done >"$RESULTS/log.txt"
}

main() {
  case ${1-} in
    -h | --help)
      usage
      return 0
      ;;
  esac
  if [ $# -lt 2 ]; then
    echo "error: ARCHIVES and RESULTS are needed; see benchmarks/on_gpu.sh --help" >&2
    return 2
  fi
  if [ ! -d "$1" ]; then
    echo "error: ARCHIVES $1 is no folder" >&2
    return 2
  fi
  local inner="" step steps status=0
  mkdir -p "$2"
  ARCHIVES=$(cd "$1" && pwd)
  RESULTS=$(cd "$2" && pwd)
  shift 2
  if [ "${1-}" = --inner ]; then
    inner=$2
    shift 2
  fi
  for step in "$@"; do
    case " $ALL_STEPS " in
      *" $step "*) ;;
      *)
        echo "error: unknown step $step; choose from $ALL_STEPS" >&2
        return 2
        ;;
    esac
  done
  DRY_RUN=${DRY_RUN:-}
  PYTHON=${PYTHON:-python3}
  WORK=${WORK:-${TMPDIR:-/tmp}/sparkme-gpu}
  local here
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  cd "$here/.."
  mkdir -p "$WORK/logs"
  WORK=$(cd "$WORK" && pwd)
  if [ -n "$inner" ]; then
    "run_$inner"
    return
  fi
  export DRY_RUN PYTHON WORK PYTHONUNBUFFERED=1
  export PYTHONPATH="$WORK/site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PATH="$WORK/site/bin:$PATH"
  rm -f "$WORK"/logs/*
  steps=" ${*:-$USUAL_STEPS} "
  for step in $ALL_STEPS; do
    case $steps in
      *" $step "*) run_one "$step" || status=1 ;;
    esac
  done
  return $status
}

# run_one STEP: runs it in a process of its own, so that it can be ended, and says how it went.
run_one() {
  local step=$1 start=$SECONDS limit code=0 problem
  problem=$(missing_for "$step")
  limit=$(step_limit "$step")
  if [ $((${LIMIT:-3600} - SECONDS)) -lt "$limit" ]; then
    limit=$((${LIMIT:-3600} - SECONDS))
  fi
  if [ "$limit" -lt 10 ]; then
    problem="no time is left"
  fi
  if [ -n "$problem" ]; then
    printf '%-14s left out: %s\n' "$step" "$problem"
    return 1
  fi
  timeout --kill-after=5 "$limit" bash benchmarks/on_gpu.sh "$ARCHIVES" "$RESULTS" --inner "$step" >"$WORK/logs/$step" 2>&1 || code=$?
  gather_logs
  case $code in
    0) printf '%-14s %4d s\n' "$step" $((SECONDS - start)) ;;
    124 | 137) printf '%-14s %4d s  ended by its limit of %d s\n' "$step" $((SECONDS - start)) "$limit" ;;
    *)
      printf '%-14s %4d s  failed (%d):\n' "$step" $((SECONDS - start)) "$code"
      tail -n 5 "$WORK/logs/$step" | cut -c 1-200 | sed 's/^/    /'
      ;;
  esac
  if [ "$step" = setup ]; then
    grep '^missing:' "$WORK/logs/setup" || true
  fi
  return "$code"
}

main "$@"
