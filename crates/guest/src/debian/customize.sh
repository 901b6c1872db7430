#!/bin/sh
# Runs inside the new root file system, as its root: what a package does not do by itself.
set -eu
: >/etc/machine-id
rm -f /var/lib/dbus/machine-id /etc/ssh/ssh_host_*_key*
echo kvasir >/etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 kvasir\n::1 localhost ip6-localhost ip6-loopback\n' >/etc/hosts
printf 'LABEL=kvasir-root / ext4 errors=remount-ro 0 1\n' >/etc/fstab
printf '[Match]\nType=ether\n[Network]\nDHCP=yes\nIPv6AcceptRA=yes\n' >/etc/systemd/network/80-dhcp.network
chmod 755 /usr/lib/kvasir/first-boot
systemctl enable kvasir-first-boot.service systemd-networkd.service systemd-resolved.service ssh.service >/dev/null 2>&1
# Waiting for the network holds up the login prompt; nothing here needs it.
systemctl disable systemd-networkd-wait-online.service >/dev/null 2>&1 || true
systemctl mask systemd-networkd-wait-online.service >/dev/null 2>&1 || true
ln -sf /run/systemd/resolve/stub-resolv.conf /etc/resolv.conf

cat >/etc/default/grub <<'END'
GRUB_DEFAULT=0
GRUB_TIMEOUT=1
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200"
GRUB_TERMINAL="console serial"
GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"
END
mkdir -p /boot/grub /usr/lib/kvasir
cat >/usr/lib/kvasir/early.cfg <<'END'
search --no-floppy --label kvasir-root --set=root
set prefix=($root)/boot/grub
END
cp -r /usr/lib/grub/i386-pc /usr/lib/grub/x86_64-efi /boot/grub/
modules="part_gpt ext2 search search_label normal configfile linux serial terminal echo test"
grub-mkimage -O i386-pc -p /boot/grub -c /usr/lib/kvasir/early.cfg -o /usr/lib/kvasir/core.img biosdisk $modules
grub-mkimage -O x86_64-efi -p /boot/grub -c /usr/lib/kvasir/early.cfg -o /usr/lib/kvasir/grub.efi $modules efi_gop
rm -rf /var/cache/apt/archives/*.deb /var/lib/apt/lists/* /var/log/*.log /var/log/apt/*
