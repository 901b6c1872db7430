# Measures how Kvasir and QEMU boot on KVM: time, exits, memory, in instruction-counted lab time.
#
# One row for each monitor and machine: the test guest as PVH kernel to its first userspace line, start of the monitor
# to the first entry into the guest, KVM exits until the line, the smallest guest to its line, and memory beyond the
# guest's with one disk.
#
# needs: kvasir qemu guest tiny stopwatch
# icount: yes
# timeout: 1800
# lab-only: yes
# default: no

. "$LAB/lib.sh"

memory=256
append='console=ttyS0 quiet panic=-1 kvasir.test=idle'
truncate -s 64M "$work/disk.img"

# The rest of a row is set by one of these two: command words (split on purpose), and how the monitor spells options.
kvasir() {
    command="$KVASIR run --accel kvm --memory ${memory}M --machine $1" dashes=--
    disk="--disk $work/disk.img"
}

qemu() {
    # -nodefaults and -cpu host are the fastest it can do; the display and network it has by default are no part of this.
    command="$QEMU -accel kvm -cpu host -m $memory -machine $1 -nodefaults -serial stdio -display none -no-reboot" dashes=-
    case $1 in
    microvm) disk="-drive id=d,if=none,format=raw,file=$work/disk.img -device virtio-blk-device,drive=d" ;;
    *) disk="-drive if=virtio,format=raw,file=$work/disk.img" ;;
    esac
}

# measure STOPWATCH-OPTIONS KERNEL [MORE...]: one run, and more should it hang.
measure() {
    options=$1 kernel=$2
    shift 2
    for attempt in 1 2 3; do
        "$XTASK" stopwatch --timeout 10 $options -- $command "${dashes}kernel" "$kernel" "$@" && return
    done
    return 1
}

linux() {
    options=$1
    shift
    measure "$options" "$LAB_GUEST/vmlinux" "${dashes}initrd" "$LAB_GUEST/initramfs.cpio" "${dashes}append" "$append" "$@"
}

row() {
    if time=$(linux --exits) && entry=$(linux --first-entry) && tiny=$(measure '' "$LAB_TINY") &&
        used=$(linux "--memory-beyond $memory" $disk); then
        echo "BENCH | $1 | $(figure line_ms "$time") | $(figure entry_ms "$entry") | $(figure exits "$time")" \
            "| $(figure line_ms "$tiny") | $(figure private_kb "$used") | $(figure resident_kb "$used") |"
        pass "$1"
    else
        fail "$1"
    fi
}

echo 'BENCH | monitor | first line, ms | first entry, ms | exits | tiny guest, ms | private, kB | resident, kB |'
echo 'BENCH | --- | ---: | ---: | ---: | ---: | ---: | ---: |'
for monitor in kvasir qemu; do
    for machine in microvm q35; do
        $monitor $machine
        row "$monitor $machine"
    done
done
finish
