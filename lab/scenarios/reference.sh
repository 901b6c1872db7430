# Boots the test guest on KVM with QEMU: shows that the lab itself works.
#
# needs: qemu guest tiny stopwatch
# default: no

. "$LAB/lib.sh"

for machine in q35 microvm; do
    for kernel in bzImage vmlinux; do
        expect "qemu $machine $kernel" 0 KVASIR-GUEST-READY \
            "$QEMU" -accel kvm -machine $machine -m 256 -nographic -net none -no-reboot \
            -kernel "$LAB_GUEST/$kernel" -initrd "$LAB_GUEST/initramfs.cpio" \
            -append 'console=ttyS0 quiet panic=-1 kvasir.test=poweroff'
    done
done
expect 'qemu q35 tiny' 0 KVASIR-GUEST-READY \
    "$QEMU" -accel kvm -machine q35 -m 256 -nographic -net none -no-reboot -kernel "$LAB_TINY"
finish
