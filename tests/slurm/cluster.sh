#!/usr/bin/env bash
# Run a command beside a real SLURM: one controller and two nodes, all on this machine, for as long as the command runs.
#
#     tests/slurm/cluster.sh COMMAND [ARGUMENTS ...]
#
# Everything lives in namespaces of its own: the network has nothing but a loopback device, so that nobody else can connect, and every
# process ends with this script, whatever happens to it. Needs root on a Debian-like Linux; installs slurm-wlm and munge if need be.
# Prints NOT RUN with the reason, and exits with 0, where that cannot be.
set -euo pipefail

not_run() {
  echo "NOT RUN: $1"
  exit 0
}

outside() {
  [ "$(id -u)" = 0 ] || not_run "a SLURM of its own needs root"
  if ! type -P slurmctld slurmd munged ip > /dev/null; then # true where all are there
    command -v apt-get > /dev/null || not_run "slurm-wlm and munge are not installed, and there is no apt-get to install them"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge iproute2; } > /dev/null \
      || not_run "apt-get could not install slurm-wlm and munge"
  fi
  local apart=(unshare --net --pid --mount --mount-proc --uts --ipc --fork --kill-child)
  "${apart[@]}" ip link set lo up || not_run "this machine lets nobody make namespaces"
  scratch=$(mktemp -d -t slurm-XXXXXX)
  trap 'rm -rf "$scratch"' EXIT
  "${apart[@]}" -- "$0" --inside "$scratch" "$@"
}

configuration() { # a node's two cores are not reserved: both nodes are this machine
  cat << END
ClusterName=test
SlurmctldHost=head(127.0.0.1)
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$scratch/state
SlurmdSpoolDir=$scratch/spool-%n
SlurmctldPidFile=$scratch/slurmctld.pid
SlurmdPidFile=$scratch/%n.pid
SlurmctldLogFile=$scratch/slurmctld.log
SlurmdLogFile=$scratch/%n.log
AuthType=auth/munge
AuthInfo=socket=$scratch/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobRequeue=1
NodeName=node-a NodeHostname=head NodeAddr=127.0.0.1 Port=6821 CPUs=2 CoresPerSocket=2
NodeName=node-b NodeHostname=head NodeAddr=127.0.0.1 Port=6822 CPUs=2 CoresPerSocket=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
}

inside() {
  scratch=$1
  shift
  ip link set lo up
  ip address add 192.0.2.1/32 dev lo # names are looked up for families that have an address besides 127.0.0.1
  hostname head
  echo "127.0.0.1 localhost head node-a node-b" > "$scratch/hosts"
  mount --bind "$scratch/hosts" /etc/hosts
  chmod 755 "$scratch"
  mkdir "$scratch"/{state,spool-node-a,spool-node-b}
  install -d -o munge "$scratch/munge"
  head -c 1024 /dev/urandom | install -o munge -m 400 /dev/stdin "$scratch/munge/key"
  local own="$scratch/munge"
  runuser -u munge -- munged --socket="$own/socket" --key-file="$own/key" --pid-file="$own/pid" --log-file="$own/log" --seed-file="$own/seed"
  export SLURM_CONF=$scratch/slurm.conf
  configuration > "$SLURM_CONF"
  slurmctld
  slurmd -N node-a
  slurmd -N node-b
  local waited=0
  until [ "$(sinfo --noheader --states=idle --format=%D 2> /dev/null)" = 2 ]; do
    waited=$((waited + 1))
    if [ "$waited" = 60 ]; then
      tail -n 20 "$scratch"/*.log
      echo "error: the nodes are not idle after $waited s" >&2
      exit 1
    fi
    sleep 1
  done
  "$@"
}

if [ "${1:-}" = --inside ]; then
  shift
  inside "$@"
else
  outside "$@"
fi
