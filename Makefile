# Builds and installs libmooncake. `make help` lists the targets.

SWIFT ?= swift
PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
PKGCONFIGDIR ?= $(LIBDIR)/pkgconfig
BUILD ?= .build
FUZZ_SECONDS ?= 600
SOAK_SECONDS ?= 600
INSTALL ?= install
STRIP ?= strip

number = $(shell sed -n 's/^\#define MOONCAKE_VERSION_$(1) //p' include/mooncake.h)
major := $(call number,MAJOR)
version := $(major).$(call number,MINOR).$(call number,PATCH)

build := $(BUILD)/release
library := $(build)/libmooncake.so
program := $(build)/mooncake
headers := $(wildcard include/*.h)
swift_sources := Package.swift Sources Tests examples/swift

# The same flags for both products, so that neither build undoes the other's work. They put the Swift
# runtime into the program; the library gets it by its own linker flags.
swift_build := $(SWIFT) build -c release --static-swift-stdlib --scratch-path $(BUILD)

all: dependencies ## libmooncake.so and the mooncake program, in .build/release
	$(swift_build) --product mooncake
	$(swift_build) --product mooncake-cli
	ln -sf libmooncake.so $(library).$(major)
	ln -sf mooncake-cli $(program)

# Otherwise a missing package shows as a compiler error about some header.
dependencies:
	@SWIFT="$(SWIFT)" scripts/install-deps --check

# Only if missing: `sudo make install` must not rebuild as root what is already built.
$(library) $(program):
	$(MAKE) all

examples: $(library) ## the C and Swift examples, in .build/examples and .build/swift-examples
	$(MAKE) -C examples/c OUT=$(abspath $(BUILD))/examples LIBRARY_FOLDER=$(abspath $(build))
	$(SWIFT) build -c release --package-path examples/swift --scratch-path $(BUILD)/swift-examples

install: $(library) $(program) ## library, headers, pkg-config file, program; PREFIX=, DESTDIR=
	$(INSTALL) -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(LIBDIR) $(DESTDIR)$(INCLUDEDIR) \
	  $(DESTDIR)$(PKGCONFIGDIR)
	$(INSTALL) -m 755 $(library) $(DESTDIR)$(LIBDIR)/libmooncake.so.$(version)
	$(STRIP) --strip-unneeded $(DESTDIR)$(LIBDIR)/libmooncake.so.$(version)
	ln -sf libmooncake.so.$(version) $(DESTDIR)$(LIBDIR)/libmooncake.so.$(major)
	ln -sf libmooncake.so.$(major) $(DESTDIR)$(LIBDIR)/libmooncake.so
	$(INSTALL) -m 755 $(program) $(DESTDIR)$(BINDIR)/mooncake
	$(STRIP) $(DESTDIR)$(BINDIR)/mooncake
	$(INSTALL) -m 644 $(headers) $(DESTDIR)$(INCLUDEDIR)
	sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@LIBDIR@|$(LIBDIR)|' \
	  -e 's|@INCLUDEDIR@|$(INCLUDEDIR)|' -e 's|@VERSION@|$(version)|' \
	  pkgconfig/mooncake.pc.in > $(DESTDIR)$(PKGCONFIGDIR)/mooncake.pc
	chmod 644 $(DESTDIR)$(PKGCONFIGDIR)/mooncake.pc

uninstall: ## removes what install has put in place; same PREFIX=, DESTDIR=
	rm -f $(DESTDIR)$(BINDIR)/mooncake $(DESTDIR)$(PKGCONFIGDIR)/mooncake.pc \
	  $(addprefix $(DESTDIR)$(LIBDIR)/libmooncake.so,.$(version) .$(major) '') \
	  $(addprefix $(DESTDIR)$(INCLUDEDIR)/,$(notdir $(headers)))

# The Python scripts install everything else themselves.
python:
	@command -v python3 >/dev/null || scripts/install-deps demo

demo: python ## a trainer and inference nodes share a real model; MODEL=path, METADATA=etcd
	METADATA="$(METADATA)" scripts/demo $(if $(MODEL),"$(MODEL)")

test: ## everything that CI runs
	scripts/test

test-program: ## tests the mooncake program and the examples
	Tests/program/test_program.py

test-install: ## tests make install in a scratch folder, and a program built against it
	scripts/test-install

bench: python all ## speed beside other libraries and the machine's limits; rewrites benchmarks/ (20 minutes)
	benchmarks/bench.py --program $(program) --library $(library)

bench-quick: python all ## the same in two minutes, only to the screen
	benchmarks/bench.py --quick --program $(program) --library $(library)

fuzz: ## the fuzzers, longer than in CI; FUZZ_SECONDS= for each
	scripts/fuzz $(FUZZ_SECONDS)

soak: python $(library) ## moves bytes between peers that are killed and stopped; SOAK_SECONDS=
	scripts/soak --duration $(SOAK_SECONDS)

format: ## rewrites the Swift sources in the project's format
	$(SWIFT) format --in-place --recursive $(swift_sources)

lint: ## checks the format of the Swift sources
	$(SWIFT) format lint --strict --recursive $(swift_sources)

clean: ## removes all build output
	rm -rf $(BUILD) examples/swift/.build

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1 - \2/p' $(MAKEFILE_LIST)

.PHONY: all dependencies examples install uninstall python demo test test-program test-install bench \
  bench-quick fuzz soak format lint clean help
