#!/usr/bin/env bash
# The words of torchrun start training; any other command is run as it is:
#
#     docker run IMAGE --nproc-per-node=8 launch/pretrain.py configs/rmoe_1b_8xa100.yaml run.dir=runs/mine
#     docker run IMAGE launch/pretrain.py configs/quickstart.yaml
#     docker run -it IMAGE bash
set -euo pipefail
case "${1:-}" in
  "" | -* | *.py) exec torchrun "$@" ;;
  *) exec "$@" ;;
esac
