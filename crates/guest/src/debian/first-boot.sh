#!/bin/sh
# First boot of a guest, or of a clone of one: host name, user, keys, size of the disk.
# What to do comes from the disk labelled CIDATA; what was done last is in /var/lib/kvasir/instance.
set -u
state=/var/lib/kvasir
mkdir -p "$state"

# The root file system takes all of a disk that was made larger.
root=$(findmnt -no SOURCE /)
disk=/dev/$(lsblk -no PKNAME "$root" 2>/dev/null | head -n 1)
if [ -b "$disk" ]; then
    growpart "$disk" "$(cat "/sys/class/block/${root#/dev/}/partition")" >/dev/null 2>&1 &&
        resize2fs "$root" >/dev/null 2>&1
fi

if [ ! -e /etc/ssh/ssh_host_ed25519_key ]; then
    ssh-keygen -q -N '' -t ed25519 -f /etc/ssh/ssh_host_ed25519_key
    ssh-keygen -q -N '' -t ecdsa -f /etc/ssh/ssh_host_ecdsa_key
fi

seed=/dev/disk/by-label/CIDATA
for _ in 1 2 3 4 5 6 7 8 9 10; do
    [ -b "$seed" ] && break
    udevadm settle -t 1
    sleep 0.2
done
[ -b "$seed" ] || exit 0
mnt=/run/kvasir-seed
mkdir -p "$mnt"
mount -o ro "$seed" "$mnt" || exit 1
[ -r "$mnt/kvasir.env" ] && . "$mnt/kvasir.env"
umount "$mnt"
[ -n "${KVASIR_INSTANCE:-}" ] || exit 0
[ "$(cat "$state/instance" 2>/dev/null)" = "$KVASIR_INSTANCE" ] && exit 0

if [ -n "${KVASIR_HOSTNAME:-}" ]; then
    echo "$KVASIR_HOSTNAME" >/etc/hostname
    hostname "$KVASIR_HOSTNAME"
    printf '127.0.0.1 localhost\n127.0.1.1 %s\n::1 localhost ip6-localhost ip6-loopback\n' "$KVASIR_HOSTNAME" >/etc/hosts
fi
if [ -n "${KVASIR_USER:-}" ]; then
    id "$KVASIR_USER" >/dev/null 2>&1 ||
        useradd --create-home --shell /bin/bash --groups sudo "$KVASIR_USER" || exit 1
    echo "$KVASIR_USER ALL=(ALL) NOPASSWD:ALL" >/etc/sudoers.d/kvasir
    chmod 440 /etc/sudoers.d/kvasir
    [ -n "${KVASIR_PASSWORD:-}" ] && printf '%s:%s\n' "$KVASIR_USER" "$KVASIR_PASSWORD" | chpasswd
    if [ -n "${KVASIR_SSH_KEYS:-}" ]; then
        home=$(getent passwd "$KVASIR_USER" | cut -d: -f6)
        install -d -m 700 -o "$KVASIR_USER" -g "$KVASIR_USER" "$home/.ssh"
        printf '%s\n' "$KVASIR_SSH_KEYS" >"$home/.ssh/authorized_keys"
        chown "$KVASIR_USER:$KVASIR_USER" "$home/.ssh/authorized_keys"
        chmod 600 "$home/.ssh/authorized_keys"
    fi
fi
echo "$KVASIR_INSTANCE" >"$state/instance"
