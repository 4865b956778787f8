//! Compiles the few calls of libpmemobj that the benchmark makes.

fn main() {
    cc::Build::new().file("src/pmem.c").opt_level(2).compile("pmem_calls");
    println!("cargo:rustc-link-lib=pmemobj");
    println!("cargo:rerun-if-changed=src/pmem.c");
}
