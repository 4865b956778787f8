//! What tests see of the file: every store, flush, fence and sync in order, and faults on demand.

use std::io;
use std::sync::Mutex;

use core::cell::Cell;
use core::sync::atomic::{AtomicI64, Ordering};

use super::media::Media;

/// One thing that happened to the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Store { at: u64, bytes: Vec<u8> },
    Flush { at: u64, len: usize },
    Fence,
    Sync,
}

/// Records events while switched on; fails the n-th sync or the n-th request for disk space.
#[derive(Debug)]
pub(crate) struct Trace {
    events: Mutex<Option<Vec<Event>>>,
    /// Calls until one fails; negative for never, or no more.
    pub(crate) fail_sync: AtomicI64,
    pub(crate) fail_back: AtomicI64,
}

thread_local! {
    /// Whether files opened on this thread are traced from the first store on.
    pub(crate) static RECORD: Cell<bool> = const { Cell::new(false) };
    /// Whether files opened on this thread with durability `Dax` need not lie on persistent memory.
    pub(crate) static ANY_FILE_FOR_DAX: Cell<bool> = const { Cell::new(false) };
    /// What `fail_back` of files opened on this thread begins with; what is left of it comes back when they close.
    pub(crate) static FAIL_BACK: Cell<i64> = const { Cell::new(-1) };
}

impl Default for Trace {
    fn default() -> Self {
        let events = RECORD.get().then(Vec::new);
        let fail_back = AtomicI64::new(FAIL_BACK.get());
        Self { events: Mutex::new(events), fail_sync: AtomicI64::new(-1), fail_back }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        FAIL_BACK.set(self.fail_back.load(Ordering::Relaxed));
    }
}

impl Trace {
    fn push(&self, event: impl FnOnce() -> Event) {
        if let Some(events) = self.events.lock().unwrap().as_mut() {
            events.push(event());
        }
    }

    pub(crate) fn start(&self) {
        *self.events.lock().unwrap() = Some(Vec::new());
    }

    pub(crate) fn count(&self) -> usize {
        self.events.lock().unwrap().as_ref().map_or(0, Vec::len)
    }

    pub(crate) fn stop(&self) -> Vec<Event> {
        self.events.lock().unwrap().take().unwrap_or_default()
    }

    pub(crate) fn store(&self, at: u64, bytes: &[u8]) {
        self.push(|| Event::Store { at, bytes: bytes.to_vec() });
    }

    pub(crate) fn words(&self, at: u64, words: &[u64]) {
        self.push(|| Event::Store { at, bytes: words.iter().flat_map(|word| word.to_le_bytes()).collect() });
    }

    pub(crate) fn touched(&self, media: &Media, at: u64, len: usize) {
        self.push(|| {
            let place = media.at(at, len);
            // SAFETY: the caller just wrote there and is on this thread.
            let bytes = unsafe { core::slice::from_raw_parts(place.as_ptr(), len) };
            Event::Store { at, bytes: bytes.to_vec() }
        });
    }

    pub(crate) fn zeroed(&self, at: u64, len: u64) {
        self.push(|| Event::Store { at, bytes: vec![0; len as usize] });
    }

    pub(crate) fn flush(&self, at: u64, len: usize) {
        self.push(|| Event::Flush { at, len });
    }

    pub(crate) fn fence(&self) {
        self.push(|| Event::Fence);
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        fail_at(&self.fail_sync, libc::EIO)?;
        self.push(|| Event::Sync);
        Ok(())
    }

    pub(crate) fn back(&self) -> io::Result<()> {
        fail_at(&self.fail_back, libc::ENOSPC)
    }
}

fn fail_at(counter: &AtomicI64, errno: i32) -> io::Result<()> {
    if counter.load(Ordering::Relaxed) >= 0 && counter.fetch_sub(1, Ordering::Relaxed) == 0 {
        return Err(io::Error::from_raw_os_error(errno));
    }
    Ok(())
}
