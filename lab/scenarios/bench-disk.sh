# Measures reading from a virtio disk on KVM, Kvasir beside QEMU, in instruction-counted lab time.
#
# A raw file in memory; the guest reads past its cache: 4 KiB at random one at a time and 32 at a time, 1 MiB in sequence.
# QEMU has an iothread and io_uring. Time is counted in instructions of the lab host, so it is the work of guest, kernel
# and monitor together.
#
# needs: kvasir qemu guest
# icount: yes
# timeout: 1800
# lab-only: yes
# default: no

. "$LAB/lib.sh"

mkdir -p "$work/mem"
mount -t tmpfs tmpfs "$work/mem"
dd if=/dev/urandom of="$work/mem/disk.img" bs=1M count=32 2>/dev/null
append='console=ttyS0 quiet panic=-1 kvasir.test=diskload'
guest="$LAB_GUEST/vmlinux" initrd="$work/initramfs.cpio"
cat "$LAB_GUEST/initramfs.cpio" "$LAB_GUEST/diskload.cpio" >"$initrd"

kvasir() {
    "$KVASIR" run --accel kvm --memory 256M --machine q35 --disk "$work/mem/disk.img,format=raw" \
        --kernel "$guest" --initrd "$initrd" --append "$append"
}

qemu() {
    "$QEMU" -accel kvm -cpu host -m 256 -machine q35 -nodefaults -serial stdio -display none -no-reboot \
        -object iothread,id=t -drive "id=d,if=none,format=raw,file=$work/mem/disk.img,aio=io_uring,cache=$1" \
        -device virtio-blk-pci,drive=d,iothread=t \
        -kernel "$guest" -initrd "$initrd" -append "$append"
}

row() {
    name=$1
    shift
    for attempt in 1 2 3; do
        timeout 120 "$@" </dev/null >"$output" 2>&1
        grep -q '^DISKLOAD-END' "$output" && break
    done
    if ! grep -q '^DISKLOAD-END' "$output"; then
        tail -n 20 "$output" | sed 's/^/    /'
        fail "$name"
        return
    fi
    one=$(sed -n 's/\r//; s/^DISKLOAD random-1 //p' "$output")
    deep=$(sed -n 's/\r//; s/^DISKLOAD random-32 //p' "$output")
    sequence=$(sed -n 's/\r//; s/^DISKLOAD sequence //p' "$output")
    echo "BENCH | $name | $(figure iops "$one") | $(figure iops "$deep") | $(figure mbps "$sequence") |"
    pass "$name"
}

echo 'BENCH | monitor | 4 KiB, depth 1, IOPS | 4 KiB, depth 32, IOPS | 1 MiB, MB/s |'
echo 'BENCH | --- | ---: | ---: | ---: |'
row kvasir kvasir
row qemu qemu writeback
finish
