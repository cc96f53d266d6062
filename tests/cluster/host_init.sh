#!/usr/bin/env bash
# Process 1 of a lab host, in namespaces of its own: mounts what is the host's, starts its sshd, says "ready" and lives
# until its standard input ends. That pipe is held by the test process: however that one ends, the host ends with it.
#   host_init.sh HOST_FOLDER SHARED_FOLDER [READ_ONLY_PATH...]
set -euo pipefail
host=$1 shared=$2
shift 2
name=$(basename "$host")

mount --make-rprivate /
hostname "$name"

# What the host's own /tmp and home would hide goes below them first. Read-only: hosts share it.
for path in "$@"; do
  case $path in
    /tmp/*) inside=$host$path ;;
    /root/*) inside=$host$path ;;
    *) continue ;;
  esac
  if [ -d "$path" ]; then mkdir -p "$inside"; else mkdir -p "$(dirname "$inside")"; touch "$inside"; fi
  mount --bind "$path" "$inside"
  mount -o remount,bind,ro "$inside"
done

mount --bind "$shared" "$shared"
mount --rbind "$host/root" /root
mount --rbind "$host/tmp" /tmp
mount -t tmpfs -o "size=${LAB_SHM_MB}m,mode=1777" shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/sshd
mount --bind "$host/../hosts" /etc/hosts
# Empty: no name server is asked, and no time is lost on it.
if [ -f /etc/resolv.conf ]; then mount --bind "$host/../resolv.conf" /etc/resolv.conf; fi
mount -o remount,bind,ro /

/usr/sbin/sshd -f "$host/sshd_config" -E /run/sshd.log
echo ready
exec >/dev/null
# Waiting, bash reaps what is orphaned, which is process 1's work; reading, it would not.
cat <&0 &
wait $!
