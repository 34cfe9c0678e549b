# The commands a person needs. Each installs what it lacks through `deploy/install-tools` (Debian packages by name).
.PHONY: demo test bench sim lint header
CARGO ?= cargo
export CARGO_BUILD_JOBS ?= 2

## make demo [KEEP=1]: build, start three nodes here, run fio through a node's death, print a table.
demo: tools
	$(CARGO) build --release -p cli -p drystone_fio
	$(CARGO) run --release -q -p cli -- demo $(if $(KEEP),--keep)

## make conformance: the environment conformance suite over the simulated environment, with many seeds.
.PHONY: conformance
conformance:
	CONFORMANCE_SEEDS=200 $(CARGO) test --release -p simenv --test conformance

# All targets in one build: libraries that only a process under test loads are not built by running tests, and
# building them apart would build most crates twice, with other features.
## make test: every test (cargo-nextest when present).
test: tools
	$(CARGO) build --workspace --all-targets
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		$(CARGO) nextest run --workspace --no-fail-fast; \
	else \
		$(CARGO) test --workspace; \
	fi

## make bench: the one-core figures; writes target/bench/results.json.
bench: tools
	$(CARGO) build --release -p cli -p drystone_fio -p bench
	$(CARGO) run --release -q -p bench

# The gate is a fixed range: a change is not to fail for what it did not do. Fresh seeds are for finding more.
## make sim [FRESH=300]: seeds of the past, 300 others, and the proof that the simulator sees; then fresh seeds for so
## many seconds, reported.
FRESH ?= 300
sim:
	$(CARGO) build --release -p sim
	$(CARGO) run --release -q -p sim -- --replay-file sim/seeds.txt
	$(CARGO) run --release -q -p sim -- --from 5000 --seeds 300
	$(CARGO) run --release -q -p sim -- --over-tolerance --from 5000 --seeds 60
	$(CARGO) run --release -q -p sim -- --planted
	-$(CARGO) run --release -q -p sim -- --for $(FRESH)

## make chaos [SHORT=1]: nodes are killed, paused, cut off and filled up while clients' every read is checked.
.PHONY: chaos failover
chaos: tools
	$(CARGO) build --release -p cli -p drystone_fio -p chaos
	$(CARGO) run --release -q -p chaos -- run $(if $(SHORT),--short)

## make failover [TRIALS=50]: the longest pause that a client sees when a node dies, hangs, is cut off, or stops.
failover: tools
	$(CARGO) build --release -p cli -p drystone_fio -p chaos
	$(CARGO) run --release -q -p chaos -- failover $(if $(TRIALS),--trials $(TRIALS))

## make background [ROUNDS=3]: what recovery and scrub cost clients.
.PHONY: background
background: tools
	$(CARGO) build --release -p cli -p drystone_fio -p chaos
	$(CARGO) run --release -q -p chaos -- background $(if $(ROUNDS),--rounds $(ROUNDS))

## make guest-test [FILTER=name]: boot a virtual machine with NVMe drives and RDMA, and run the tests in it.
.PHONY: guest-test guest
guest-test: tools
	@deploy/install-tools rdma
	$(CARGO) build --release -p guest --features guest/rdma
	$(CARGO) run --release -q -p guest --features guest/rdma -- run $(if $(FILTER),--filter $(FILTER))

## make guest: a shell in that machine; the files of this one are there to read.
guest: tools
	@deploy/install-tools rdma
	$(CARGO) build --release -p guest --features guest/rdma
	$(CARGO) run --release -q -p guest --features guest/rdma -- shell

## make lint: format, clippy with warnings denied, licences.
lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

## make header: write client/native/include/drystone.h anew; a test checks that it is up to date.
header:
	DRYSTONE_WRITE_HEADER=1 $(CARGO) test -p drystone --test header

.PHONY: tools
tools:
	@deploy/install-tools
