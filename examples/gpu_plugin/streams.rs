//! The caller's streams by their raw handles, found without a lock.
//!
//! Invariants
//! 1. A [`Known`] stream is in the table of its site from the first call that names it until
//!    [`Streams::end`]; nothing else drops it.
//! 2. A thread's recent entry is used only while `EPOCH` is what it was when the entry was made, and `end` raises
//!    `EPOCH` before it drops a stream. Who ends a stream promises that no call with it is under way.

use core::ptr::null;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use memory_pool::{GpuDevice, Stream};

/// Raw handles with a meaning of their own.
pub const LEGACY: usize = 1;
pub const PER_THREAD: usize = 2;

static EPOCH: AtomicU64 = AtomicU64::new(0);

/// The streams of one device that callers named.
#[derive(Debug)]
pub struct Streams {
    gpu: GpuDevice,
    legacy: Stream,
    known: Mutex<HashMap<usize, Box<Stream>>>,
}

/// What a thread used last.
#[derive(Clone, Copy)]
struct Recent {
    of: *const Streams,
    raw: usize,
    epoch: u64,
    stream: *const Stream,
}

const SLOTS: usize = 8;

thread_local! {
    static RECENT: Cell<[Recent; SLOTS]> =
        const { Cell::new([Recent { of: null(), raw: 0, epoch: 0, stream: null() }; SLOTS]) };
    /// The thread's own default streams, a device; they end with the thread.
    static OWN: RefCell<Vec<Stream>> = const { RefCell::new(Vec::new()) };
}

impl Streams {
    pub fn new(gpu: &GpuDevice) -> Self {
        Self { gpu: gpu.clone(), legacy: gpu.default_stream(), known: Mutex::default() }
    }

    /// Runs `run` with the stream of this raw handle; null is the legacy default stream.
    #[inline]
    pub fn with<R>(&self, raw: usize, run: impl FnOnce(&Stream) -> R) -> R {
        match raw {
            0 | LEGACY => run(&self.legacy),
            PER_THREAD => self.with_own(run),
            raw => run(self.find(raw)),
        }
    }

    #[inline]
    fn find(&self, raw: usize) -> &Stream {
        // Handles are addresses of objects of some hundred bytes, or small numbers.
        let slot = (raw ^ (raw >> 8)) % SLOTS;
        let recent = RECENT.get()[slot];
        if recent.raw == raw
            && core::ptr::eq(recent.of, self)
            && recent.epoch == EPOCH.load(Ordering::Acquire)
        {
            // SAFETY: invariant 2.
            return unsafe { &*recent.stream };
        }
        self.find_slow(raw, slot)
    }

    #[cold]
    fn find_slow(&self, raw: usize, slot: usize) -> &Stream {
        let epoch = EPOCH.load(Ordering::Acquire);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let stream: *const Stream = &**known.entry(raw).or_insert_with(|| {
            // SAFETY: the caller of the entry point vouches for its stream until it is ended, or for good.
            Box::new(unsafe { self.gpu.stream_from_raw(raw as *mut _) })
        });
        let mut all = RECENT.get();
        all[slot] = Recent { of: self, raw, epoch, stream };
        RECENT.set(all);
        // SAFETY: invariant 1.
        unsafe { &*stream }
    }

    fn with_own<R>(&self, run: impl FnOnce(&Stream) -> R) -> R {
        OWN.with_borrow_mut(|own| {
            let at = own.iter().position(|stream| stream.device().same(&self.gpu)).unwrap_or_else(|| {
                own.push(self.gpu.per_thread_stream());
                own.len() - 1
            });
            run(&own[at])
        })
    }

    /// The caller is about to destroy a stream: what it ordered is covered by one last event, and the raw handle
    /// may name another stream from now on. Returns whether the stream was known.
    ///
    /// # Safety
    /// The stream still exists, and no call that names it is under way.
    pub unsafe fn end(&self, raw: usize) -> bool {
        let stream = self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(&raw);
        EPOCH.fetch_add(1, Ordering::AcqRel);
        stream.is_some()
    }
}
