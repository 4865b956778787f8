//! Memory of CUDA graphs: what is allocated on a stream while it is captured belongs to the graph, which uses it at
//! every replay, so it must not meet other work.
//!
//! The caller says when it begins and ends to capture into a pool of graphs, and when the last graph of it is gone.
//! Between, a captured stream is noticed when it first asks for memory, and from then on has a memory of its own, which
//! all captures into that pool of graphs share. Where the caller says nothing, each graph has memory of its own.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use memory_pool::Stream;
use memory_pool::gpu::GraphMemory;

use crate::report::Fault;
use crate::site::Site;

/// The number of a pool of graphs, as the caller gives it.
pub type GraphPool = (u64, u64);

/// The memory of one captured stream.
#[derive(Debug)]
struct Private {
    of: GraphPool,
    raw: usize,
    memory: GraphMemory,
    /// Whether the stream has it now.
    set: bool,
}

#[derive(Debug, Default)]
struct State {
    active: Vec<GraphPool>,
    private: Vec<Private>,
}

/// The graph pools of one device.
#[derive(Debug, Default)]
pub struct Captures {
    state: Mutex<State>,
    /// How many captures are active; looked at without the lock.
    active: AtomicUsize,
}

impl Captures {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn begin(&self, of: GraphPool) {
        let mut state = self.state();
        state.active.push(of);
        self.active.store(state.active.len(), Ordering::Release);
    }

    pub fn end(&self, site: &Site, of: GraphPool) -> Result<(), Fault> {
        let mut state = self.state();
        if let Some(at) = state.active.iter().rposition(|&active| active == of) {
            state.active.remove(at);
        }
        self.active.store(state.active.len(), Ordering::Release);
        for private in state.private.iter_mut().filter(|private| private.of == of && private.set) {
            site.streams.with(private.raw, |stream| stream.set_graph_memory(None))?;
            private.set = false;
        }
        Ok(())
    }

    /// The last graph of the pool is gone: its memory is everybody's again.
    pub fn release(&self, of: GraphPool) {
        let gone: Vec<Private> = {
            let mut state = self.state();
            state.private.extract_if(.., |private| private.of == of && !private.set).collect()
        };
        // Their end waits for the device, with no lock held.
        drop(gone);
    }

    /// Whether anything is captured into a pool of graphs.
    #[inline]
    pub fn any(&self) -> bool {
        self.active.load(Ordering::Acquire) != 0
    }

    /// Gives a stream that is being captured into a pool of graphs its memory, unless it has it already.
    #[cold]
    pub fn adopt(&self, site: &Site, raw: usize) -> Result<(), Fault> {
        if !site.streams.with(raw, Stream::is_capturing) {
            return Ok(());
        }
        let mut state = self.state();
        let Some(&of) = state.active.last() else { return Ok(()) };
        let at = match state.private.iter().position(|private| (private.of, private.raw) == (of, raw)) {
            Some(at) => at,
            None => {
                state.private.push(Private { of, raw, memory: GraphMemory::new(&site.gpu), set: false });
                state.private.len() - 1
            }
        };
        let private = &mut state.private[at];
        if !private.set {
            site.streams.with(raw, |stream| stream.set_graph_memory(Some(&private.memory)))?;
            private.set = true;
        }
        Ok(())
    }
}
