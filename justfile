# Each recipe is a step of .ci/run, which is what CI runs; `just` without a name runs them all.
ci *STEPS:
    .ci/run {{STEPS}}

fmt: (ci "fmt")
clippy: (ci "clippy")
doc: (ci "doc")
test: (ci "test")
features: (ci "features")
loom: (ci "loom")
examples: (ci "examples")
package: (ci "package")

# Address and leak sanitizer over the tests of the library and of the host pools (nightly). Walking the stack by
# frame pointers reads what the sanitizer fences off or moves elsewhere, so tests that name frames are left out and fake
# stacks are off.
asan:
    RUSTFLAGS="-Zsanitizer=address" ASAN_OPTIONS=detect_stack_use_after_return=0 cargo +nightly test --lib --test pools --test pool_edges --target x86_64-unknown-linux-gnu --target-dir target/asan -- --skip base::stack --skip observe::tests

# The same over all tests of persistent pools.
asan-persist:
    RUSTFLAGS="-Zsanitizer=address" cargo +nightly test --lib --target x86_64-unknown-linux-gnu --target-dir target/asan persist::
    RUSTFLAGS="-Zsanitizer=address" cargo +nightly test --test persist_api --test persist_faults --test persist_crash --target x86_64-unknown-linux-gnu --target-dir target/asan

# A process killed at random while it works on a persistent pool, again and again.
kills COUNT="1000":
    MEMORY_POOL_KILLS={{COUNT}} cargo test --release --test persist_crash -- --nocapture

# Thread sanitizer (nightly). std is not instrumented, so only races in our own code are reported.
tsan:
    RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer" cargo +nightly test --lib --tests --target x86_64-unknown-linux-gnu --target-dir target/tsan

# The heap under everything at once, at random, for as long as wanted; and under the sanitizers (nightly).
soak SECONDS="600":
    MEMORY_POOL_SOAK_SECONDS={{SECONDS}} cargo test --release --lib heap::soak -- --nocapture
soak-asan SECONDS="600":
    MEMORY_POOL_SOAK_SECONDS={{SECONDS}} RUSTFLAGS="-Zsanitizer=address" cargo +nightly test --lib --target x86_64-unknown-linux-gnu --target-dir target/asan heap::soak -- --nocapture
soak-tsan SECONDS="600":
    MEMORY_POOL_SOAK_SECONDS={{SECONDS}} RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer" cargo +nightly test --lib --target x86_64-unknown-linux-gnu --target-dir target/tsan heap::soak -- --nocapture

# The tests of the heap under the thread sanitizer with an instrumented std, so that what passes through std counts too
# (nightly with rust-src; some ten minutes of building, less than a gigabyte).
tsan-heap SECONDS="60":
    RUSTFLAGS="-Zsanitizer=thread" MEMORY_POOL_SOAK_SECONDS={{SECONDS}} cargo +nightly test -Zbuild-std --lib --target x86_64-unknown-linux-gnu --target-dir target/tsan-std heap::
    RUSTFLAGS="-Zsanitizer=thread" cargo +nightly test -Zbuild-std --test heap_global --test heap_pool --test heap_config --target x86_64-unknown-linux-gnu --target-dir target/tsan-std -- --test-threads 1

# Fuzz one target for a while: `just fuzz ranges 600`.
fuzz TARGET SECONDS="60":
    cargo +nightly fuzz run {{TARGET}} -- -max_total_time={{SECONDS}}

bench:
    cargo bench

# Instructions on the heap's fast paths against the recorded table (valgrind, objdump): fails where one grew or locks.
heap-paths *ARGS:
    cargo bench --bench heap_paths -- {{ARGS}}

# What the heap comes to hold under an hour's worth of operations of the kinds that make heaps grow.
blow-up FACTOR="200":
    MEMORY_POOL_BLOW_UP={{FACTOR}} cargo test --release --test heap_blow_up -- --nocapture
