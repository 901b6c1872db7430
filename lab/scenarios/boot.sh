# Boots the test guest on KVM with every machine, kernel format and number of vCPUs.
#
# needs: kvasir guest tiny
# timeout: 600

. "$LAB/lib.sh"


for machine in q35 microvm; do
    for kernel in bzImage vmlinux; do
        for cpus in 1 2; do
            expect "$machine $kernel, $cpus vCPU: first line" 0 KVASIR-GUEST-READY \
                "$KVASIR" run --accel kvm --machine $machine --cpus $cpus --memory 256M \
                --kernel "$LAB_GUEST/$kernel" --initrd "$LAB_GUEST/initramfs.cpio" \
                --append 'console=ttyS0 quiet panic=-1 kvasir.test=report'
            if grep -q "^CPUS $cpus" "$output"; then
                pass "$machine $kernel, $cpus vCPU: all online"
            else
                fail "$machine $kernel, $cpus vCPU: all online" "$(grep ^CPUS "$output")"
            fi
        done
    done
done

# How a run ends is told by its status: 0 after a power-off, 3 after a reset if asked not to go on.
for machine in q35 microvm; do
    expect "$machine: reset" 3 KVASIR-GUEST-READY \
        "$KVASIR" run --accel kvm --machine $machine --memory 256M --no-reboot \
        --kernel "$LAB_GUEST/vmlinux" --initrd "$LAB_GUEST/initramfs.cpio" \
        --append 'console=ttyS0 quiet panic=-1 kvasir.test=reboot'
    expect "$machine: smallest guest" 3 KVASIR-GUEST-READY \
        "$KVASIR" run --accel kvm --machine $machine --memory 256M --no-reboot --kernel "$LAB_TINY"
done

finish
