#!/usr/bin/env bash
# A throw-away host with a real systemd as PID 1, in namespaces of this machine.
#
#   systemd-host.sh boot DIR [TREE...]  start one; its state is kept in DIR (created). The host sees an overlay of this
#                                       machine's root, and each TREE that lies on another file system, read-only
#   systemd-host.sh halt DIR            end it; everything it wrote is gone
#
# It can run what is installed here and changes nothing here. /tmp, /run and /dev/shm are its own and empty. Its network
# is this machine's. Needs root, overlayfs and cgroup2 (Linux 5.11 or later).
set -euo pipefail

inside() {  # the mount namespace's first process; becomes systemd
  local dir=$1 root=$1/root tree
  shift
  mount --make-rprivate /
  mount -t tmpfs tmpfs "$dir/layer"
  mkdir -p "$dir/layer/upper" "$dir/layer/work"
  mount -t overlay overlay -o "lowerdir=/,upperdir=$dir/layer/upper,workdir=$dir/layer/work" "$root"
  mount -t proc proc "$root/proc"
  mount -t sysfs -o ro sysfs "$root/sys"
  mount -t cgroup2 none "$root/sys/fs/cgroup"
  mount --rbind /dev "$root/dev"
  for own in dev/shm run tmp; do mount -t tmpfs -o mode=1777 tmpfs "$root/$own"; done
  chmod 755 "$root/run"
  for tree in "$@"; do
    if [[ ! -e $root$tree/. || $(stat -c %d "$tree") != $(stat -c %d /) ]]; then
      mkdir -p "$root$tree"
      mount --bind "$tree" "$root$tree"
      mount -o remount,bind,ro "$root$tree"
    fi
  done
  mkdir -p "$root/run/systemd/system"
  # These would touch devices, the network or other packages' services.
  for unit in systemd-udevd.service systemd-networkd.service systemd-resolved.service \
    systemd-tmpfiles-setup-dev.service postgresql.service nginx.service docker.service prometheus.service; do
    ln -sf /dev/null "$root/run/systemd/system/$unit"
  done
  exec chroot "$root" env -i PATH="$PATH" LANG=C.UTF-8 container=systemd-host \
    /lib/systemd/systemd --log-target=console --unit=multi-user.target
}

boot() {
  local dir outer child state
  dir=$(realpath -m "$1")
  shift
  mkdir -p "$dir/root" "$dir/layer"
  setsid unshare --mount --uts --ipc --pid --cgroup --fork --kill-child \
    "$(realpath "$0")" _inside "$dir" "$@" >"$dir/boot.log" 2>&1 </dev/null &
  outer=$!
  for _ in $(seq 300); do
    kill -0 "$outer" 2>/dev/null || break
    child=$(pgrep -P "$outer" | head -n 1 || true)
    if [[ -n $child && $(cat "/proc/$child/comm" 2>/dev/null) == systemd ]]; then
      echo "$child" >"$dir/pid"
      state=$(nsenter --target "$child" --mount --uts --ipc --pid --cgroup --root --wd -- \
        systemctl is-system-running 2>/dev/null || true)
      case $state in running | degraded) return 0 ;; esac
    fi
    sleep 0.2
  done
  cat "$dir/boot.log" >&2
  exit 1
}

halt() {
  local dir
  dir=$(realpath -m "$1")
  [[ -s $dir/pid ]] && kill -KILL "$(cat "$dir/pid")" 2>/dev/null || true
  rm -f "$dir/pid" "$dir/boot.log"
  rmdir "$dir/root" "$dir/layer" "$dir" 2>/dev/null || true
}

case ${1:-} in
  _inside) shift; inside "$@" ;;
  boot) shift; boot "$@" ;;
  halt) halt "$2" ;;
  *) sed -n '2,10p' "$0" >&2; exit 2 ;;
esac
