# Tatami: build, try, test, measure. `make help` lists the targets.

# Release speed with debug assertions, for `run` and `test`; `bench` and `install` build plain releases.
SHELL := /bin/bash

PROFILE ?= checked
DIST    ?= $(CURDIR)/target/dist
TARGET  := x86_64-unknown-linux-gnu
OUT     := target/$(PROFILE)
IMAGES  := target/images
FUZZ_SECONDS ?= 60

# Debian packages that the builds need (the lab and the kernel's sources bring their own).
PACKAGES := acpica-tools bc bison build-essential busybox-static cpio e2fsprogs erofs-utils flex kmod libelf-dev \
            libseccomp-dev libssl-dev mmdebstrap protobuf-compiler python3 rsync xz-utils zstd

.PHONY: help deps build dist images run test lint deny unit guests growth memory-types test-vfio vfio-guests passthrough suites brief-suites pods docker soak bench fuzz install uninstall clean
.DEFAULT_GOAL := help

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: ## Install the Debian packages that the build needs (root)
	@missing=$$(dpkg-query -W -f '$${Package} $${Status}\n' $(PACKAGES) 2>/dev/null | awk '/ installed$$/{print $$1}' \
	    | sort | comm -13 - <(printf '%s\n' $(PACKAGES) | sort)); \
	if [ -n "$$missing" ]; then \
	    echo "Installing" $$missing; \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends $$missing; \
	fi

# What a node gets is built by itself: together with the builders it would get all the features of theirs too. For tests,
# crates are built once for all.
STACK := -p dragonball -p runtime-rs
TOOLS := -p kernel-config -p rootfs-builder -p lab -p tests

build: deps ## Build the stack: binaries, guest kernel, guest image
ifeq ($(PROFILE),checked)
	cargo build --locked --profile $(PROFILE) --workspace $(WITH_TESTS)
else
	cargo build --locked --profile $(PROFILE) $(STACK)
	cargo build --locked --profile $(PROFILE) $(TOOLS)
endif
	LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=/usr/lib/x86_64-linux-gnu \
	RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static" \
	    cargo build --locked --profile agent --target $(TARGET) -p kata-agent
	$(OUT)/kernel-config build --profile base --output target/kernel

dist: build ## Stage what a node gets, under target/dist
	install -D -t $(DIST)/usr/bin $(OUT)/containerd-shim-kata-v2 $(OUT)/kata-ctl $(OUT)/dragonball
	install -D -m 644 target/kernel/vmlinux $(DIST)/usr/share/kata-containers/vmlinux
	$(OUT)/rootfs-builder image --agent target/$(TARGET)/agent/kata-agent \
	    --output $(DIST)/usr/share/kata-containers/kata-containers.img
	install -D -m 644 runtime-rs/configuration.toml $(DIST)/usr/share/defaults/kata-containers/configuration.toml

images: build ## Make the OCI archives of the demonstration and the suites
	mkdir -p $(IMAGES)
	$(OUT)/rootfs-builder oci --image busybox --output $(IMAGES)/busybox.tar
	$(OUT)/rootfs-builder oci --image pause --output $(IMAGES)/pause.tar
	$(OUT)/rootfs-builder oci --image debian --output $(IMAGES)/debian.tar

run: dist images ## Run real OCI images in VMs of ours, and show output and a boot timeline
	$(OUT)/run-suites demo --dist $(DIST) --images $(IMAGES) --bin $(OUT) --report target/run

# What tests alone depend on gives crates more features: without the tests among them, they would be built once more.
test: WITH_TESTS := --all-targets
test: lint unit brief-suites vfio-guests ## Everything that must pass

lint: deps
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --profile $(PROFILE) -- -D warnings

deny: ## Check licences, duplicates and sources of all crates (cargo-deny)
	@cargo deny --version > /dev/null 2>&1 || cargo install --locked cargo-deny
	cargo deny --locked check licenses bans sources

unit: deps
	cargo test --locked --workspace --profile $(PROFILE)

# The host's KVM was tested by `unit`, if it has one; the lab's is another.
guests: build ## Small guests on the lab's KVM, and Linux guests, Debian's own among them, that change while they run
	$(call run-program,machine,--report target/suites)
	$(call run-linux,--report target/suites --kernel target/kernel/vmlinux)
	$(call run-linux,--report target/suites/debian --filter hot_plug --debian-kernel)

# The program by which a guest uses devices that are passed to it: static, because the guest has nothing else.
PASSTHROUGH := target/$(TARGET)/$(PROFILE)/lab-passthrough

passthrough: deps
	RUSTFLAGS="-C target-feature=+crt-static" cargo build --locked --profile $(PROFILE) --target $(TARGET) -p lab-passthrough

# Beside the unmodified kernel of pods, the one whose modules drive NVMe and let programs see interrupts by pins.
GPU_KERNEL := target/kernel-gpu
GPU_MODULES = $(addprefix --module ,$(foreach name,nvme-core nvme uio_pci_generic,$(shell find $(GPU_KERNEL)/lib -name $(name).ko)))
VFIO_DEVICES := $(addprefix --device ,edu gpu ivshmem testdev ati+edu)

# Runs the tests in dragonball/tests/$(1), as `unit` built them, in a lab machine; $(2) says which, with what.
define run-program
@set -o pipefail; program=$$(cargo test --locked --workspace --profile $(PROFILE) --test $(1) --no-run 2>&1 \
    | tee -a /dev/stderr | sed -n 's|.*tests/$(1)/main.rs (\(.*\))$$|\1|p') && \
$(OUT)/run-suites program "$$program" $(2)
endef

# The same for those of Linux guests.
run-linux = $(call run-program,linux,$(1))

# Those of devices of the host; $(1) is the guests' kernel, $(2) names the devices and how often they come and go.
run-vfio = $(call run-linux,--report target/vfio --filter passthrough --kernel $(1)/vmlinux --passthrough $(PASSTHROUGH) $(2))

# The first tests are the GPU model's, the second those of the lab machine with an IOMMU.
test-vfio: build passthrough ## Devices of the host in guests, in lab machines with an IOMMU, a GPU model and others
	cargo test --locked --workspace --profile $(PROFILE) --test hostile --test program --test service
	cargo test --locked --workspace --profile $(PROFILE) --test iommu -- --include-ignored --test-threads 1
	$(OUT)/kernel-config build --profile gpu --output $(GPU_KERNEL)
	$(call run-vfio,$(GPU_KERNEL),$(VFIO_DEVICES) --device nvme $(GPU_MODULES) --rounds 50)
	$(call run-vfio,$(GPU_KERNEL),$(VFIO_DEVICES) $(GPU_MODULES) --rounds 50 --machine-kernel iommufd)
	$(MAKE) memory-types

# The short form of it: two devices, in guests and in containers.
vfio-guests: dist images passthrough
	$(call run-vfio,target/kernel,--device edu --device gpu:1G --rounds 2)
	$(OUT)/run-suites test --dist $(DIST) --images $(IMAGES) --bin $(OUT) --report target/vfio --filter devices: \
	    --passthrough $(PASSTHROUGH) --device edu --device gpu:1G

# The guests' kernel has no debugfs; the lab's own shows which memory types page tables have, a GPU's video memory included.
memory-types: build passthrough ## Memory types in Linux guests, by a kernel that shows those of its page tables
	$(OUT)/kernel-config build --profile lab --output target/kernel-lab
	$(call run-linux,--report target/memory-types --filter memory_types --kernel target/kernel-lab/vmlinux)
	$(call run-linux,--report target/memory-types --filter passthrough --kernel target/kernel-lab/vmlinux \
	    --passthrough $(PASSTHROUGH) --rounds 2 --device gpu:1G)

# A machine that grows and shrinks while it works, as often as is promised; `guests` does it twice.
GROWTH_ROUNDS ?= 20

growth: build ## Resize a Linux guest under load, GROWTH_ROUNDS times, in a lab machine with 6 GiB
	$(call run-linux,--report target/growth --filter growth --kernel target/kernel/vmlinux --memory 6144 \
	    --rounds $(GROWTH_ROUNDS))

RUN_SUITES = $(OUT)/run-suites test --dist $(DIST) --images $(IMAGES) --bin $(OUT)

suites: dist images guests ## Small guests, and all end-to-end cases against containerd 1.7 and 2.1
	$(RUN_SUITES) --report target/suites --pods

# All with containerd 2.1; with 1.7 those that show how containerd is served.
brief-suites: dist images guests
	$(RUN_SUITES) --report target/suites --pods --brief

pods: dist images ## Pods as a kubelet makes them, by the CRI of containerd 1.7 and 2.1
	$(RUN_SUITES) --report target/pods --pods --filter cri:

docker: dist images ## Containers as docker makes them, with its networks, on the containerds 1.7 and 2.1
	$(RUN_SUITES) --report target/docker --docker --filter docker:

# 110 pods five times, eight at a time, and then all kinds of pods and containers for SOAK_MINUTES.
SOAK_MINUTES ?= 120

soak: dist images ## Pods that come and go for hours, by the CRI of containerd 2.1
	$(RUN_SUITES) --report target/soak --snapshot containerd-2.1 --pods --soak $(SOAK_MINUTES) --filter soak:

bench: ## Measure what the project promises; report in target/bench
	$(MAKE) dist images PROFILE=release DIST=$(CURDIR)/target/dist-release
	cargo run --locked --profile release -p benches -- --dist target/dist-release --images $(IMAGES) --output target/bench

# `unit` does a short run of each target, on stable Rust: see dragonball/src/virtio/testing/targets.rs.
# As many targets run side by side as there are processors; what each printed is in target/fuzz.
fuzz: deps ## Fuzz what faces the guest, FUZZ_SECONDS each (nightly Rust)
	@cargo +nightly --version > /dev/null 2>&1 || rustup toolchain install --profile minimal nightly
	@cargo fuzz --version > /dev/null 2>&1 || cargo install --locked cargo-fuzz
	@mkdir -p target/fuzz && cd dragonball && cargo +nightly fuzz build && \
	cargo +nightly fuzz list | xargs -P $$(nproc) -I TARGET $(SHELL) -c ' \
	    mkdir -p fuzz/corpus/TARGET; \
	    if cargo +nightly fuzz run TARGET fuzz/corpus/TARGET fuzz/seeds/TARGET -- -max_total_time=$(FUZZ_SECONDS) \
	        > ../target/fuzz/TARGET.log 2>&1; \
	    then echo "fuzz TARGET: nothing found, $$(grep ^Done ../target/fuzz/TARGET.log)"; \
	    else echo "fuzz TARGET: failed, see target/fuzz/TARGET.log"; tail -n 20 ../target/fuzz/TARGET.log; exit 1; fi'

# Running pods have the old kernel and image mapped: files are replaced, never written into.
PREFIX ?= /usr
INSTALL := DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' CONTAINERD='$(CONTAINERD)' FORCE='$(FORCE)' deploy/install.sh

install: ## Install on this machine; DESTDIR and PREFIX are honoured, CONTAINERD=1 tells containerd, too
	$(MAKE) dist PROFILE=release DIST=$(CURDIR)/target/dist-release
	DIST=$(CURDIR)/target/dist-release $(INSTALL) install

uninstall: ## Take back what `install` did, with the same DESTDIR and PREFIX
	$(INSTALL) uninstall

clean: ## Remove what was built here; the cache (~/.cache/tatami) stays
	cargo clean
