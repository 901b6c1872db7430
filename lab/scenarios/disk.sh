# Writes, reads back and discards on a disk of a guest on KVM.
#
# needs: kvasir guest

. "$LAB/lib.sh"

truncate -s 32M "$work/disk.img"
for machine in q35 microvm; do
    expect "$machine: disk" 0 'DISK-RESULT ok' \
        "$KVASIR" run --accel kvm --machine $machine --memory 256M --disk "$work/disk.img" \
        --kernel "$LAB_GUEST/vmlinux" --initrd "$LAB_GUEST/initramfs.cpio" \
        --append 'console=ttyS0 quiet panic=-1 kvasir.test=disk'
done
finish
