# Measures how Kvasir and QEMU boot on KVM: time, exits, memory, in instruction-counted lab time.
#
# needs: kvasir qemu guest tiny stopwatch
# icount: yes
# timeout: 1800
# lab-only: yes
# default: no

. "$LAB/lib.sh"

truncate -s 64M /tmp/disk.img
append='console=ttyS0 quiet panic=-1 kvasir.test=idle'
linux="-kernel $LAB_GUEST/vmlinux -initrd $LAB_GUEST/initramfs.cpio"
qemu="$QEMU -accel kvm -m 256 -nographic -net none -no-reboot"
kvasir="$KVASIR run --accel kvm --memory 256M"

# The words of each command are split on purpose; the kernel command line is passed whole.
# row NAME TINY-COMMAND LINUX-COMMAND APPEND-OPTION DISK-WORDS
row() {
    time=$("$XTASK" stopwatch --exits -- $3 "$4" "$append") || { fail "$1"; return; }
    entry=$("$XTASK" stopwatch --first-entry -- $3 "$4" "$append") || { fail "$1"; return; }
    tiny=$("$XTASK" stopwatch -- $2) || { fail "$1 tiny"; return; }
    memory=$("$XTASK" stopwatch --memory-beyond 256 -- $3 $5 "$4" "$append") || { fail "$1 memory"; return; }
    echo "BENCH | $1 | $(figure line_ms "$time") | $(figure entry_ms "$entry") | $(figure exits "$time")" \
        "| $(figure line_ms "$tiny") | $(figure private_kb "$memory") | $(figure resident_kb "$memory") |"
    pass "$1"
}

echo 'BENCH | monitor | first line, ms | first entry, ms | exits | tiny guest, ms | private, kB | resident, kB |'
echo 'BENCH | --- | ---: | ---: | ---: | ---: | ---: | ---: |'
if [ -x "$KVASIR" ]; then
    row 'kvasir microvm' "$kvasir --machine microvm --kernel $LAB_TINY" \
        "$kvasir --machine microvm --kernel $LAB_GUEST/vmlinux --initrd $LAB_GUEST/initramfs.cpio" --append \
        '--disk /tmp/disk.img'
    row 'kvasir q35' "$kvasir --machine q35 --kernel $LAB_TINY" \
        "$kvasir --machine q35 --kernel $LAB_GUEST/vmlinux --initrd $LAB_GUEST/initramfs.cpio" --append \
        '--disk /tmp/disk.img'
fi
row 'qemu microvm' "$qemu -machine microvm -kernel $LAB_TINY" "$qemu -machine microvm $linux" -append \
    '-drive id=d,if=none,format=raw,file=/tmp/disk.img -device virtio-blk-device,drive=d'
row 'qemu q35' "$qemu -machine q35 -kernel $LAB_TINY" "$qemu -machine q35 $linux" -append \
    '-drive if=virtio,format=raw,file=/tmp/disk.img'
finish
