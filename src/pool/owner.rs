//! Which thread a pool belongs to.

/// The thread that may use a pool, if it is one alone.
#[derive(Debug)]
pub(crate) struct Owner {
    /// Its token; 0 where every thread may.
    thread: usize,
}

/// A number that no two live threads share: the address of a variable that each has its own of.
#[inline]
fn token() -> usize {
    thread_local!(static MARK: u8 = const { 0 });
    MARK.with(|mark| core::ptr::from_ref(mark) as usize)
}

impl Owner {
    /// Everybody, or the calling thread.
    pub(crate) fn new(everybody: bool) -> Self {
        Self { thread: if everybody { 0 } else { token() } }
    }

    /// Whether every thread may use the pool.
    #[inline(always)]
    pub(super) fn is_everybody(&self) -> bool {
        self.thread == 0
    }

    /// Whether the calling thread may use the pool.
    pub(crate) fn admits(&self) -> bool {
        self.thread == 0 || self.thread == token()
    }
}
