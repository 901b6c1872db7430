# The commands of every day. `make` lists them.

# A C compiler and linker, for cargo.
BUILD_PACKAGES = gcc libc6-dev
# Firmware for guests that boot from a disk; what makes such disks from packages.
RUN_PACKAGES = seabios ovmf mmdebstrap openssh-client
# The lab host's emulator, the other implementation the disk formats are compared with, a reader for our archives.
TEST_PACKAGES = qemu-system-x86 qemu-utils cpio procps \
	grub-common grub-pc-bin grub-efi-amd64-bin xorriso mtools gdb python3-venv

CARGO ?= cargo
# A guest's memory and processors for `make run`.
MEMORY ?= 512M
CPUS ?= 1

.PHONY: help setup setup-run build guest run fmt check unit lab test test-fast bench doc

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 12

setup: ## install the Debian packages for building, running and testing (as root; otherwise say which)
	@lab/setup $(BUILD_PACKAGES) $(RUN_PACKAGES) $(TEST_PACKAGES)

setup-run: ## the same without what only the tests need
	@lab/setup $(BUILD_PACKAGES) $(RUN_PACKAGES)

build: ## build the kvasir program
	$(CARGO) build --release --package kvasir

guest: ## prepare the test guest in the cache directory
	@$(CARGO) xtask guest

run: setup-run build ## boot a small guest and leave you at its shell; Ctrl-A x ends it
	@guest=$$($(CARGO) xtask guest) && $(CARGO) run --quiet --release --package kvasir -- run \
		--kernel "$$guest/vmlinux" --initrd "$$guest/initramfs.cpio" --append "console=ttyS0 quiet" \
		--memory $(MEMORY) --cpus $(CPUS)

fmt: ## format the sources
	$(CARGO) fmt --all

check: ## formatting and lints
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --release -- -D warnings

test-fast: check ## formatting, lints and the tests that need no guest
	$(CARGO) test --workspace --release

unit: guest ## all tests but the lab's: those on the software CPU boot the guest
	$(CARGO) test --workspace --release -- --include-ignored

lab: ## scenarios on real KVM, in an emulated host where this one has none
	$(CARGO) xtask lab

test: setup ## everything continuous integration runs
	$(MAKE) check
	$(MAKE) unit
	$(MAKE) lab

bench: setup ## measure booting, beside QEMU
	$(CARGO) xtask bench boot
	$(CARGO) xtask lab bench-boot

doc: ## build the reference of the crates
	$(CARGO) doc --workspace --no-deps --document-private-items
