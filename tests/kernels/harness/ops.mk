# SPDX-License-Identifier: Apache-2.0
# Tests of the row operations: `make -f ops.mk`, then `... sanitize`, `... neon`
# (with an aarch64 compiler and qemu), `... bench`.
SOURCE := ../../../kernels/tritera_kernels/cpu
BUILD ?= build/ops
NEON_CXX ?= aarch64-linux-gnu-g++
NEON_RUN ?= qemu-aarch64-static
CXXFLAGS := -std=c++17 -O3 -ffp-contract=off -fno-math-errno -Wall -Wextra \
  -Werror -I$(SOURCE)
FLAGS_ops_avx2 := -mavx2 -mfma -mf16c
FLAGS_ops_avx512 := -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni \
  -mavx512vbmi -mavx2 -mfma
TABLES := portable avx2 avx512 neon
HEADERS := $(wildcard $(SOURCE)/*.h) ops_testing.h

test: $(BUILD)/native/test_ops
	$<
sanitize: $(BUILD)/sanitize/test_ops
	$<
neon: $(BUILD)/neon/test_ops
	$(NEON_RUN) $< 60
bench: $(BUILD)/native/bench_ops
	$<
.PHONY: test sanitize neon bench

# A folder's compiler and flags.
$(BUILD)/sanitize/%: EXTRA := -g -fsanitize=address,undefined \
  -fno-sanitize-recover=all
$(BUILD)/neon/%: CXX := $(NEON_CXX)
$(BUILD)/neon/%: EXTRA := -static
$(BUILD)/neon/%: FLAGS_ops_avx2 :=
$(BUILD)/neon/%: FLAGS_ops_avx512 :=

define folder
$(BUILD)/$(1)/%.o: $(SOURCE)/%.cc $(HEADERS)
	@mkdir -p $$(@D)
	$$(CXX) $$(CXXFLAGS) $$(EXTRA) $$(FLAGS_$$*) -c $$< -o $$@
$(BUILD)/$(1)/%.o: %.cc $(HEADERS)
	@mkdir -p $$(@D)
	$$(CXX) $$(CXXFLAGS) $$(EXTRA) -c $$< -o $$@
$(BUILD)/$(1)/test_ops: $(BUILD)/$(1)/test_ops.o $(BUILD)/$(1)/test_attend.o \
  $(TABLES:%=$(BUILD)/$(1)/ops_%.o)
	$$(CXX) $$(EXTRA) $$^ -o $$@
$(BUILD)/$(1)/bench_ops: $(BUILD)/$(1)/bench_ops.o \
  $(TABLES:%=$(BUILD)/$(1)/ops_%.o)
	$$(CXX) $$(EXTRA) $$^ -pthread -o $$@
endef
$(foreach kind,native sanitize neon,$(eval $(call folder,$(kind))))
