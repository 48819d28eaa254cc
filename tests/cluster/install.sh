#!/bin/bash
# The packages of a SLURM on this machine, for tests/cluster (slurm.py). Debian or Ubuntu, as root; no daemon is started.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
missing=0
for command in slurmctld slurmd sbatch munged ip nsenter pgrep; do command -v $command > /dev/null || missing=1; done
if [ $missing = 0 ]; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "tests/cluster: SLURM is not installed, and this is not root on Debian: its tests skip" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d # theirs would start with a configuration that there is not
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod 755 $policy
    trap 'rm -f $policy' EXIT
fi
apt-get -o DPkg::Lock::Timeout=300 update -qq
apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends \
    slurm-wlm slurm-client slurmctld slurmd munge iproute2 util-linux procps > /dev/null
