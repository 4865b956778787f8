//! The calls of `pmem.c`.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::Path;

#[repr(C)]
struct RawPool([u8; 0]);
/// A `PMEMoid`.
#[repr(C)]
pub struct Oid([u64; 2]);

unsafe extern "C" {
    fn pm_create(path: *const c_char, size: usize) -> *mut RawPool;
    fn pm_open(path: *const c_char) -> *mut RawPool;
    fn pm_close(pool: *mut RawPool);
    fn pm_error() -> *const c_char;
    fn pm_class(pool: *mut RawPool) -> c_int;
    fn pm_root(pool: *mut RawPool, count: usize) -> *mut Oid;
    fn pm_insert(pool: *mut RawPool, slot: *mut Oid, words: *const u64) -> c_int;
    fn pm_publish(pool: *mut RawPool, slot: *mut Oid, words: *const u64) -> c_int;
    fn pm_pair(pool: *mut RawPool, slot: *mut Oid) -> c_int;
    fn pm_free(slot: *mut Oid);
    fn pm_transaction(pool: *mut RawPool, slot: *mut Oid, words: *const u64) -> c_int;
    fn pm_fill(pool: *mut RawPool, class: c_int) -> u64;
    fn pm_iterate(pool: *mut RawPool) -> u64;
    fn pm_first(pool: *mut RawPool) -> c_int;
}

/// A pool of libpmemobj, closed when dropped.
pub struct Pool(*mut RawPool);

fn checked(pool: *mut RawPool) -> Pool {
    if pool.is_null() {
        // SAFETY: the library's message is a string.
        let said = unsafe { CStr::from_ptr(pm_error()) };
        panic!("libpmemobj: {}", said.to_string_lossy());
    }
    Pool(pool)
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_encoded_bytes()).unwrap()
}

// SAFETY of the calls below: the pool is open, slots are those of its root, and one thread uses it.
impl Pool {
    pub fn create(path: &Path, size: usize) -> Self {
        checked(unsafe { pm_create(c_path(path).as_ptr(), size) })
    }
    pub fn open(path: &Path) -> Self {
        checked(unsafe { pm_open(c_path(path).as_ptr()) })
    }
    pub fn class(&self) -> c_int {
        unsafe { pm_class(self.0) }
    }
    pub fn slots(&self, count: usize) -> *mut Oid {
        unsafe { pm_root(self.0, count) }
    }
    pub fn insert(&self, slot: *mut Oid, words: &[u64; 8]) {
        assert_eq!(unsafe { pm_insert(self.0, slot, words.as_ptr()) }, 0);
    }
    pub fn publish(&self, slot: *mut Oid, words: &[u64; 8]) {
        assert_eq!(unsafe { pm_publish(self.0, slot, words.as_ptr()) }, 0);
    }
    pub fn transaction(&self, slot: *mut Oid, words: &[u64; 8]) {
        assert_eq!(unsafe { pm_transaction(self.0, slot, words.as_ptr()) }, 0);
    }
    pub fn pair(&self, slot: *mut Oid) {
        assert_eq!(unsafe { pm_pair(self.0, slot) }, 0);
    }
    pub fn free(&self, slot: *mut Oid) {
        unsafe { pm_free(slot) };
    }
    pub fn fill(&self, class: c_int) -> u64 {
        unsafe { pm_fill(self.0, class) }
    }
    pub fn iterate(&self) -> u64 {
        unsafe { pm_iterate(self.0) }
    }
    pub fn first(&self) {
        assert_eq!(unsafe { pm_first(self.0) }, 0);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        unsafe { pm_close(self.0) };
    }
}
