//! Pools that watch what they hand out: for the simulated device, for a debug layer, for one thread, or with
//! frees that wait. Other pools have one branch here, and no more.
//!
//! A debug layer ([`DebugConfig`](crate::DebugConfig)) guards device memory as it guards the host's: canaries
//! around each block and patterns in freed ones are written and read back by copies on a stream of the pool's
//! own; a quarantine, leaks with the stack that allocated, history and findings are the same.
//! - An allocation waits for its stream, and a free for all streams that were named for the block, so that what
//!   the layer reads is what the program left. Kernels do not overlap with the pool's work then, as they would
//!   under `CUDA_LAUNCH_BLOCKING`.
//! - What is allocated while its stream is captured into a graph is not guarded: the graph may run at any time.
//!   A block that is freed in a capture goes back unchecked.
//! - Where a driver call fails twice, nothing is found in what could not be read.
//!
//! Invariants
//! 1. A block is known to the layer, or in `bare`, or the layer does not track: nothing else is live.
//! 2. Blocks that the layer knows are published under their inner address, which the layer gives back.
//! 3. The layer gives a block back only after all work on it was waited for, so it is free for everybody.

use core::alloc::Layout;
use core::fmt;
use std::collections::HashSet;
use std::sync::Arc;

use super::super::core::{Placed, Ticket};
use super::super::device::GpuDevice;
use super::super::ranges::CLEAN;
use super::super::stream::Stream;
use super::Inner;
use crate::base::config::PoolConfig;
use crate::base::diagnostics::Diagnostics;
use crate::base::error::{Error, OomReason, PointerFault, Refusal, Result};
use crate::base::pool::{ActiveAllocation, AllocFlags, MemoryType};
use crate::base::stats::MemoryStats;
use crate::base::sync::Lock;
use crate::engine::Block;
use crate::observe::{DebugLayer, HostReach, Observer, Reach};
use crate::pool::owner::Owner;

/// Why a pool takes the watched way.
pub(super) struct Watch {
    /// Whether the device wants to hear of blocks.
    device: bool,
    layer: Option<DebugLayer<GpuReach>>,
    /// Blocks of graphs, which the layer leaves alone.
    bare: Lock<HashSet<usize>>,
    owner: Owner,
    /// Whether frees wait for the device.
    waits: bool,
}

impl Watch {
    /// What there is to watch; `None` where there is nothing.
    pub(super) fn new(
        device: &GpuDevice,
        name: &str,
        config: &PoolConfig,
        memory: MemoryType,
    ) -> Result<Option<Box<Self>>> {
        let watched = device.0.driver.info().watches_blocks;
        let plain = config.thread_safe && config.stream_ordered && !config.debug.is_on();
        if plain && !watched {
            return Ok(None);
        }
        let layer = if config.debug.is_on() {
            let reach = match memory {
                MemoryType::Gpu => GpuReach::Copies(device.new_stream()?),
                _ => GpuReach::Cpu,
            };
            Some(DebugLayer::with_reach(name, config, reach)?)
        } else {
            None
        };
        Ok(Some(Box::new(Self {
            device: watched,
            layer,
            bare: Lock::default(),
            owner: Owner::new(config.thread_safe),
            waits: !config.stream_ordered,
        })))
    }

    /// The layer, if it knows blocks and not their latency alone.
    fn tracker(&self) -> Option<&DebugLayer<GpuReach>> {
        self.layer.as_ref().filter(|layer| !layer.in_place())
    }
}

/// How a debug layer reaches the bytes of a pool.
pub(super) enum GpuReach {
    /// As ordinary memory.
    Cpu,
    /// By copies on a stream of its own.
    Copies(Stream),
}

impl fmt::Debug for GpuReach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if matches!(self, Self::Cpu) { "Cpu" } else { "Copies" })
    }
}

/// Bytes that are read back at once.
const CHUNK: usize = 4 << 20;

/// Tries twice: a passing failure must not look like a finding.
fn twice(call: impl Fn() -> Result<()>) -> bool {
    call().or_else(|_| call()).is_ok()
}

impl GpuReach {
    /// Copies bytes of the device into `out`; whether that worked. They are there when it returns.
    ///
    /// # Safety
    /// As for [`Reach::read`].
    unsafe fn copy_out(stream: &Stream, at: usize, out: &mut [u8]) -> bool {
        let driver = &stream.device().0.driver;
        twice(|| {
            // SAFETY: `out` is ours until the stream has settled; `at` is the caller's contract.
            let issued = unsafe { driver.copy(out.as_ptr() as usize, at, out.len(), stream.raw()) };
            stream.settle();
            issued
        })
    }
}

// SAFETY: copies and fills touch exactly the bytes they are given, and are waited for.
unsafe impl Reach for GpuReach {
    unsafe fn fill(&self, at: usize, len: usize, byte: u8) {
        match self {
            // SAFETY: the caller's contract, for memory that the CPU may touch.
            Self::Cpu => unsafe { HostReach.fill(at, len, byte) },
            Self::Copies(_) if len == 0 => {}
            Self::Copies(stream) => {
                let driver = &stream.device().0.driver;
                twice(|| {
                    // SAFETY: the caller's contract.
                    unsafe { driver.fill(at, byte, len, stream.raw()) }?;
                    driver.stream_sync(stream.raw())
                });
            }
        }
    }

    unsafe fn read(&self, at: usize, out: &mut [u8]) {
        match self {
            // SAFETY: as above.
            Self::Cpu => unsafe { HostReach.read(at, out) },
            // SAFETY: as above.
            Self::Copies(stream) => _ = unsafe { Self::copy_out(stream, at, out) },
        }
    }

    unsafe fn holds(&self, at: usize, len: usize, byte: u8) -> bool {
        let Self::Copies(stream) = self else {
            // SAFETY: as above.
            return unsafe { HostReach.holds(at, len, byte) };
        };
        let mut chunk = vec![byte; len.min(CHUNK)];
        (0..len).step_by(CHUNK).all(|start| {
            let part = &mut chunk[..(len - start).min(CHUNK)];
            // SAFETY: a part of the caller's bytes. What cannot be read is given the benefit of the doubt.
            unsafe {
                !Self::copy_out(stream, at + start, part)
                    || HostReach.holds(part.as_ptr() as usize, part.len(), byte)
            }
        })
    }
}

impl Inner {
    /// Whether somebody watches the pool's blocks.
    #[inline]
    pub(in crate::gpu) fn is_watched(&self) -> bool {
        self.watch.is_some()
    }

    /// Frees a block on `stream`, or for the CPU.
    #[inline]
    pub(in crate::gpu) fn give(
        self: &Arc<Self>,
        ticket: Ticket,
        start: usize,
        len: usize,
        stream: Option<&Stream>,
    ) {
        match &self.watch {
            None => self.give_plain(ticket, start, stream),
            Some(watch) => self.give_watched(watch, ticket, start, len, stream),
        }
    }

    /// Frees the block that the user knows at `address`.
    #[inline]
    pub(super) fn give_at(self: &Arc<Self>, address: usize, stream: Option<&Stream>) -> Result<()> {
        match &self.watch {
            None => self.give_plain_at(address, stream),
            Some(watch) => self.give_watched_at(watch, address, stream),
        }
    }

    #[cold]
    fn give_watched_at(
        self: &Arc<Self>,
        watch: &Watch,
        address: usize,
        stream: Option<&Stream>,
    ) -> Result<()> {
        let (ticket, len) = self.find(address).inspect_err(|_| self.refuse(address))?;
        if watch.layer.is_none() && !watch.waits {
            self.tell_freed(watch, address, len);
            self.give_plain(ticket, address, stream);
            return Ok(());
        }
        self.give(ticket, address, len, stream);
        Ok(())
    }

    #[cold]
    pub(super) fn take_watched(
        self: &Arc<Self>,
        watch: &Watch,
        bytes: usize,
        align: usize,
        stream: Option<&Stream>,
        flags: AllocFlags,
        by_address: bool,
    ) -> Result<Placed> {
        if !watch.owner.admits() {
            return Err(Error::InvalidOperation(Refusal::WrongThread));
        }
        let captured = stream.is_some_and(Stream::is_capturing);
        let Some(layer) = watch.layer.as_ref().filter(|_| !captured) else {
            let placed = self.take_plain(bytes, align, stream, flags, by_address)?;
            if watch.tracker().is_some() {
                watch.bare.lock().insert(placed.start);
            }
            self.tell_taken(watch, placed, stream);
            return Ok(placed);
        };
        let asked = Layout::from_size_align(bytes, align)?;
        let inner = layer.inflate(asked).ok_or(Error::oom(bytes, OomReason::Overflow))?;
        let reserved = self.core.lock().reserved;
        let placed = loop {
            match self.take_plain(inner.size(), inner.align(), stream, flags, by_address) {
                Err(Error::OutOfMemory { .. }) if self.evict(watch, true) => {}
                taken => break taken?,
            }
        };
        let grown = self.core.lock().reserved.saturating_sub(reserved);
        if grown > 0 {
            layer.on_grow(grown);
        }
        self.tell_taken(watch, placed, stream);
        let Placed { ticket, start, len, .. } = placed;
        if !layer.in_place() {
            // The stream's earlier work on this memory must be over before the layer writes to it (invariant 2).
            let ready = self.finish(stream).and_then(|()| match self.core.lock().publish(ticket) {
                true => Ok(()),
                false => Err(Error::oom(bytes, OomReason::Source)),
            });
            if let Err(error) = ready {
                self.tell_freed(watch, start, len);
                self.give_plain(ticket, start, stream);
                return Err(error);
            }
        }
        // SAFETY: the block was just cut, and all work on it is complete.
        let block = unsafe { layer.on_alloc(asked, Block { start, size: len, dirty: len }) };
        Ok(Placed { ticket, start: block.start, len: block.size, published: placed.published })
    }

    #[cold]
    fn give_watched(
        self: &Arc<Self>,
        watch: &Watch,
        ticket: Ticket,
        start: usize,
        len: usize,
        stream: Option<&Stream>,
    ) {
        let captured = stream.is_some_and(Stream::is_capturing);
        let tracked = watch.tracker().filter(|_| !watch.bare.lock().remove(&start));
        let shared = self.core.lock().is_shared(ticket);
        // A free that waits makes the block free for everybody (invariant 3).
        let waited = !captured
            && (watch.waits || tracked.is_some())
            && if shared || watch.waits {
                self.device.synchronize().is_ok()
            } else {
                self.finish(stream).is_ok()
            };
        let Some(layer) = tracked else {
            if let Some(layer) = watch.layer.as_ref().filter(|layer| layer.in_place()) {
                // SAFETY: such a layer takes times alone.
                let _ = unsafe { layer.on_free(start, None) };
            }
            self.tell_freed(watch, start, len);
            if waited {
                self.give_clean(ticket)
            } else {
                self.give_plain(ticket, start, stream)
            }
            return;
        };
        if !waited {
            // Into a graph, or behind a device that cannot be waited for.
            if let Some(inner) = layer.let_through(start) {
                self.tell_freed(watch, inner, len);
                self.give_plain(ticket, inner, stream);
            }
            return;
        }
        // SAFETY: what is wrong with the address is what the layer is to find.
        if let Some(inner) = unsafe { layer.on_free(start, None) } {
            self.give_inner(watch, inner);
        }
        self.evict(watch, false);
    }

    /// An address was to be freed that is no live block: the layer takes note.
    #[cold]
    pub(super) fn refuse(&self, address: usize) {
        let Some(watch) = &self.watch else { return };
        let Some(layer) = watch.tracker() else { return };
        // SAFETY: as far as the pool knows it is none of its blocks, and the layer looks again.
        if let Some(inner) = unsafe { layer.on_free(address, None) } {
            self.give_inner(watch, inner);
        }
    }

    /// Waits for a stream; `None` is the CPU.
    fn finish(&self, stream: Option<&Stream>) -> Result<()> {
        match stream {
            Some(stream) => self.device.0.driver.stream_sync(stream.raw()),
            None => Ok(()),
        }
    }

    fn tell_taken(&self, watch: &Watch, placed: Placed, stream: Option<&Stream>) {
        if watch.device {
            self.device.0.driver.block_taken(placed.start, placed.len, stream.map(Stream::raw));
        }
    }

    fn tell_freed(&self, watch: &Watch, start: usize, len: usize) {
        if watch.device {
            self.device.0.driver.block_freed(start, len);
        }
    }

    /// Frees a block of which all work is complete.
    fn give_clean(&self, ticket: Ticket) {
        let mut core = self.core.lock();
        core.unshare(ticket);
        core.free(&*self.device.0.driver, ticket, CLEAN, None);
    }

    /// Frees a block that the layer gave back.
    fn give_inner(&self, watch: &Watch, inner: usize) {
        let found = {
            let core = self.core.lock();
            core.find(inner).map(|ticket| (ticket, core.len(ticket)))
        };
        // Invariant 2: it is found.
        if let Ok((ticket, len)) = found {
            self.tell_freed(watch, inner, len);
            self.give_clean(ticket);
        }
    }

    fn evict(&self, watch: &Watch, all: bool) -> bool {
        let mut any = false;
        while let Some(inner) = watch.layer.as_ref().and_then(|layer| layer.evict(all)) {
            any = true;
            self.give_inner(watch, inner);
        }
        any
    }

    /// Frees everything that the layer holds back.
    pub(super) fn empty_quarantine(&self) {
        if let Some(watch) = &self.watch {
            self.evict(watch, true);
        }
    }

    /// The block that the user knows at `address`, and its size.
    pub(super) fn find(&self, address: usize) -> Result<(Ticket, usize)> {
        let tracker = self
            .watch
            .as_ref()
            .and_then(|watch| watch.tracker().filter(|_| !watch.bare.lock().contains(&address)));
        let Some(layer) = tracker else {
            let core = self.core.lock();
            let ticket = core.find(address)?;
            return Ok((ticket, core.len(ticket)));
        };
        let known = layer.find(address);
        let core = self.core.lock();
        let Some((inner, size)) = known else {
            let fault = if core.owns(address) { PointerFault::NotLive } else { PointerFault::Foreign };
            return Err(Error::pointer(address, fault));
        };
        let ticket = core.find(inner)?;
        Ok((ticket, size.unwrap_or_else(|| core.len(ticket))))
    }

    /// Whether blocks may be resized where they are.
    pub(super) fn in_place(&self) -> bool {
        self.watch.as_ref().is_none_or(|watch| watch.tracker().is_none())
    }

    /// A block grew to `[start, start + after)`.
    pub(super) fn tell_grown(&self, start: usize, before: usize, after: usize, stream: Option<&Stream>) {
        if let Some(watch) = &self.watch
            && watch.device
            && after > before
        {
            self.device.0.driver.block_taken(start + before, after - before, stream.map(Stream::raw));
        }
    }

    /// The live blocks as the user sees them.
    pub(super) fn active(&self) -> Vec<ActiveAllocation> {
        let known = self.watch.as_ref().and_then(|watch| Some((watch, watch.layer.as_ref()?.live()?)));
        let Some((watch, mut live)) = known else {
            let mut live = Vec::new();
            let core = self.core.lock();
            core.for_each_live(&mut |start, len, _| live.push(ActiveAllocation::new(start, len)));
            return live;
        };
        let bare = watch.bare.lock().clone();
        self.core.lock().for_each_live(&mut |start, len, _| {
            if bare.contains(&start) {
                live.push(ActiveAllocation::new(start, len));
            }
        });
        live
    }

    /// How many blocks the user holds.
    pub(super) fn live_blocks(&self) -> usize {
        let held =
            self.watch.as_ref().and_then(|watch| watch.layer.as_ref()).map_or(0, |layer| layer.held().0);
        let core = self.core.lock();
        core.live_blocks().saturating_sub(self.front.blocks()).saturating_sub(held)
    }

    /// What books and caches counted.
    pub(super) fn counts(&self) -> MemoryStats {
        let mut core = self.core.lock();
        core.note_peak(|| self.front.low());
        let mut stats = core.stats();
        self.front.add_to(&mut stats);
        stats
    }

    /// Bytes live now.
    pub(super) fn live(&self) -> usize {
        let core = self.core.lock();
        core.live.saturating_sub(self.front.bytes())
    }

    pub(super) fn stats(&self) -> MemoryStats {
        let mut stats = self.counts();
        self.tracking.show(&mut stats);
        let layer = self.watch.as_ref().and_then(|watch| watch.layer.as_ref());
        if let Some(layer) = layer {
            stats.latency = layer.latency();
            if !layer.in_place() {
                // What the layer adds to a block, or holds back, is not the user's.
                stats.deallocation_count += layer.held().0 as u64;
                stats.current_allocated = self.active().iter().map(|block| block.size).sum();
            }
        }
        stats
    }

    /// The pool is emptied, whatever is live.
    pub(super) fn forget_all(&self) {
        let Some(watch) = &self.watch else { return };
        if let Some(layer) = &watch.layer {
            layer.on_reset();
        }
        watch.bare.lock().clear();
        if watch.device {
            let core = self.core.lock();
            core.for_each_live(&mut |start, len, _| self.device.0.driver.block_freed(start, len));
        }
    }

    /// The pool goes away, and all work on the device is complete.
    pub(super) fn on_drop(&self) {
        if let Some(layer) = self.watch.as_ref().and_then(|watch| watch.layer.as_ref()) {
            layer.on_drop();
        }
    }

    pub(super) fn diagnostics(&self) -> Option<&dyn Diagnostics> {
        self.watch.as_ref()?.layer.as_ref()?.diagnostics()
    }
}
