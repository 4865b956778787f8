//! The only place where pools grow and shrink.
//!
//! A request that finds no room takes the growth ticket, looks again (another thread may have grown the pool
//! meanwhile), asks the source with no other lock held, and then, under the pool's lock, adds the span and
//! cuts its own block before anybody else sees the span. Who waited for the ticket looks again in turn.

use core::alloc::Layout;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use super::core::Core;
use super::front::{Front, LARGE_ALIGN};
use super::large::PAGE;
use crate::base::bits::round_up;
use crate::base::error::{Error, OomReason, Refusal, Result};
use crate::base::host::Resized;
use crate::base::pool::AllocFlags;
use crate::engine::{Block, Span};
use crate::observe::Observer;
use crate::source::{Region, Source};

/// Least bytes to grow by, unless a limit says otherwise.
const MIN_GROWTH: usize = 64 << 10;

impl<F: Front, S: Source, O: Observer> Core<F, S, O> {
    /// A block that the pool has no room for.
    #[cold]
    #[inline(never)]
    pub(super) fn alloc_slow(&self, layout: Layout, flags: AllocFlags) -> Result<Block> {
        loop {
            let error = match self.alloc_growing(layout, flags) {
                Ok(block) => return Ok(block),
                Err(error) => error,
            };
            // What the observer holds back may be what is missing, or the program may free something.
            let freed = O::ACTIVE && self.evict(true);
            if freed && let Some(block) = self.front.alloc(layout) {
                return Ok(block);
            }
            let callback = self.oom_callback.lock().clone();
            if !callback.is_some_and(|callback| callback(layout)) {
                self.failed.fetch_add(1, Ordering::Relaxed);
                return Err(error);
            }
            if let Some(block) = self.front.alloc(layout) {
                return Ok(block);
            }
        }
    }

    fn alloc_growing(&self, layout: Layout, flags: AllocFlags) -> Result<Block> {
        if flags.contains(AllocFlags::NO_GROW) {
            return Err(Error::oom(layout.size(), OomReason::NoGrow));
        }
        if layout.size() >= F::DIRECT || layout.align() >= LARGE_ALIGN {
            return self.alloc_large(layout);
        }
        let grown = self.front.ticket(|| {
            if let Some(block) = self.front.alloc(layout) {
                return Ok(block);
            }
            self.open()?;
            let need = self.front.with(|engine| engine.need(layout));
            let need = need.ok_or(Error::oom(layout.size(), OomReason::Overflow))?;
            let align = layout.align().max(self.config().alignment);
            // An alignment that the memory at hand does not have is no sign that much more is needed.
            let wanted = if align > PAGE { need.max(MIN_GROWTH) } else { self.step(need) };
            let span = self.take_span(need, wanted, align, layout.size())?;
            self.publish(span, layout)
        });
        grown.unwrap_or(Err(Error::refused(
            "the pool was called by its own source",
            "let the source use other memory",
        )))
    }

    /// Adds a span and cuts a block from it before anybody else can.
    fn publish(&self, span: Span, layout: Layout) -> Result<Block> {
        let added = self.front.with(|engine| {
            // SAFETY: a region of the source of ours, released only after the engine gave it back
            // (invariant 1).
            unsafe { engine.add(span) }?;
            Ok(engine.alloc(layout))
        });
        match added {
            Ok(Some(block)) => Ok(block),
            Ok(None) => Err(Error::oom(layout.size(), OomReason::Source)),
            Err(span) => {
                self.release_span(span);
                Err(Error::oom(layout.size(), OomReason::Source))
            }
        }
    }

    /// What to grow by where at least `need` is missing.
    fn step(&self, need: usize) -> usize {
        // Memory that is there in any case is taken whole.
        let limit = self.source.limit();
        if limit != usize::MAX {
            return limit.max(need);
        }
        let reserved = self.reserved.load(Ordering::Relaxed);
        let reserved = reserved.saturating_sub(self.large.totals().live_bytes);
        let factor = (reserved as f64 * self.config().growth_factor) as usize;
        need.max(factor).max(MIN_GROWTH)
    }

    /// Reserves a span with a payload of at least `need` bytes, `wanted` if possible. The ticket is held.
    fn take_span(&self, need: usize, wanted: usize, align: usize, requested: usize) -> Result<Span> {
        let max = self.config().max_size;
        let room = max - self.reserved.load(Ordering::Relaxed).min(max);
        if need > room {
            return Err(Error::oom(requested, OomReason::Limit(max)));
        }
        let mut wanted = wanted.min(room).max(need);
        loop {
            match self.reserve_span(wanted, align, requested) {
                Ok(span) => return Ok(span),
                Err(error) if wanted == need => return Err(error),
                // The source may still have what is needed, if not what would be handy.
                Err(_) => wanted = (wanted / 2).max(need),
            }
        }
    }

    /// Reserves a span with a payload of `payload` bytes.
    fn reserve_span(&self, payload: usize, align: usize, requested: usize) -> Result<Span> {
        let overflow = Error::oom(requested, OomReason::Overflow);
        let exact = self.front.with(|engine| engine.span_len(payload)).ok_or(overflow)?;
        let granularity = self.source.granularity();
        let whole = round_up(exact, granularity).ok_or(overflow)?;
        // The last bytes of a page beyond the limit stay unused, so that `max_size` is exact.
        let max = self.config().max_size;
        let charge_whole = self.front.with(|engine| engine.payload(whole));
        let (len, charge) = if self.charge(charge_whole) {
            (whole, charge_whole)
        } else {
            let charge = self.front.with(|engine| engine.payload(exact));
            if !self.charge(charge) {
                return Err(Error::oom(requested, OomReason::Limit(max)));
            }
            (exact, charge)
        };
        self.source_calls.fetch_add(1, Ordering::Relaxed);
        match self.source.reserve(whole, align) {
            Ok(region) => {
                self.observer.on_grow(charge);
                self.region.store(region.start(), Ordering::Relaxed);
                Ok(Span { start: region.base.expose_provenance().get(), len, zeroed: region.zeroed })
            }
            Err(error) => {
                self.reserved.fetch_sub(charge, Ordering::Relaxed);
                Err(match error {
                    Error::OutOfMemory { reason, .. } => Error::oom(requested, reason),
                    other => other,
                })
            }
        }
    }

    /// Counts `bytes` towards the limit before they are reserved; `false` where that would exceed it.
    fn charge(&self, bytes: usize) -> bool {
        let max = self.config().max_size;
        let add = |reserved: usize| reserved.checked_add(bytes).filter(|&sum| sum <= max);
        let Ok(before) = self.reserved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add) else {
            return false;
        };
        self.peak_reserved.fetch_max(before + bytes, Ordering::Relaxed);
        true
    }

    fn release_span(&self, span: Span) {
        let Some(base) = NonNull::new(core::ptr::with_exposed_provenance_mut(span.start)) else { return };
        let len = round_up(span.len, self.source.granularity()).unwrap_or(span.len);
        let charge = self.front.with(|engine| engine.payload(span.len));
        self.release(Region { base, len, zeroed: false }, charge);
    }

    /// Gives a region back and uncounts it.
    pub(super) fn release(&self, region: Region, charge: usize) {
        self.source_calls.fetch_add(1, Ordering::Relaxed);
        // Another pool may have it as soon as it is given back.
        let _ = self.region.compare_exchange(region.start(), 0, Ordering::Relaxed, Ordering::Relaxed);
        // SAFETY: a region of ours with nothing in use: the engine gave it back, or its block was freed.
        unsafe { self.source.release(region) };
        self.reserved.fetch_sub(charge, Ordering::Relaxed);
    }

    /// Makes `bytes` available.
    pub(super) fn reserve(&self, bytes: usize) -> Result<()> {
        self.admit()?;
        let reserved = self.front.ticket(|| {
            self.open()?;
            if self.front.with(|engine| {
                engine.settle();
                engine.ready()
            }) >= bytes
            {
                return Ok(());
            }
            let align = self.config().alignment;
            let layout = Layout::from_size_align(bytes, align)?;
            let need = self.front.with(|engine| engine.need(layout));
            let need = need.ok_or(Error::oom(bytes, OomReason::Overflow))?;
            // What a block of that size, or a span, needs beside its bytes must not put the limit out of reach.
            let max = self.config().max_size;
            let room = max - self.reserved.load(Ordering::Relaxed).min(max);
            let whole = self.front.with(|engine| engine.span_len(room).map(|len| engine.payload(len)));
            let beside = whole.unwrap_or(room).saturating_sub(room);
            let need = if bytes <= room { need.min(room - beside.min(room)) } else { need };
            let limit = self.source.limit();
            let wanted = if limit == usize::MAX { need } else { limit.max(need) };
            let span = self.take_span(need, wanted, align, bytes)?;
            // SAFETY: as in `publish`.
            self.front.with(|engine| unsafe { engine.add(span) }).map_err(|span| {
                self.release_span(span);
                Error::oom(bytes, OomReason::Source)
            })
        });
        reserved.unwrap_or(Err(Error::InvalidOperation(Refusal::Other(
            "the pool was called by its own source",
            "let the source use other memory",
        ))))
    }

    /// Says no where the pool was closed.
    fn open(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            Err(Error::InvalidOperation(Refusal::Destroyed))
        } else {
            Ok(())
        }
    }

    /// Gives everything back and refuses to grow from now on; an error while anything is live. Closing costs
    /// the fast path nothing: a pool without memory takes the slow one.
    pub(super) fn close(&self) -> Result<()> {
        self.admit()?;
        self.evict(true);
        let closed = self.front.ticket(|| {
            // What is allocated meanwhile keeps its span, and is counted in the next round.
            loop {
                match self.live() {
                    0 => self.give_back_idle(0),
                    live => return Err(Error::InvalidOperation(Refusal::StillLive(live))),
                };
                if self.front.with(|engine| engine.free_bytes().0) == 0 && self.live() == 0 {
                    break;
                }
            }
            self.closed.store(true, Ordering::Release);
            Ok(())
        });
        closed.unwrap_or(Err(Error::refused("the pool is growing", "close it when no call is under way")))
    }

    /// Gives idle spans back until `keep` free bytes are left; returns the bytes given back.
    pub(super) fn trim(&self, keep: usize) -> Result<usize> {
        self.admit()?;
        self.evict(true);
        Ok(self.front.ticket(|| self.give_back_idle(keep)).unwrap_or(0))
    }

    pub(super) fn give_back_idle(&self, keep: usize) -> usize {
        let before = self.reserved.load(Ordering::Relaxed);
        let mut given = 0;
        loop {
            let span = self.front.with(|engine| {
                engine.settle();
                let spare = engine.free_bytes().0.saturating_sub(keep);
                let at_most = if keep == 0 { usize::MAX } else { engine.span_len(spare).unwrap_or(spare) };
                if spare == 0 { None } else { engine.remove_idle(at_most) }
            });
            let Some(span) = span else { break };
            given += self.front.with(|engine| engine.payload(span.len));
            self.release_span(span);
        }
        debug_assert!(given <= before);
        given
    }

    /// A block that is a region of its own.
    fn alloc_large(&self, layout: Layout) -> Result<Block> {
        let requested = layout.size();
        let granularity = self.source.granularity();
        let len = round_up(requested, granularity).ok_or(Error::oom(requested, OomReason::Overflow))?;
        let max = self.config().max_size;
        self.open()?;
        if !self.large.prepare() {
            return Err(Error::oom(requested, OomReason::Source));
        }
        if !self.charge(len) {
            self.large.cancel();
            return Err(Error::oom(requested, OomReason::Limit(max)));
        }
        self.source_calls.fetch_add(1, Ordering::Relaxed);
        let align = layout.align().max(self.config().alignment).max(PAGE);
        let region = match self.source.reserve(len, align) {
            Ok(region) => region,
            Err(error) => {
                self.large.cancel();
                self.reserved.fetch_sub(len, Ordering::Relaxed);
                return Err(error);
            }
        };
        let start = region.base.expose_provenance().get();
        self.observer.on_grow(len);
        self.large.insert(region, true);
        Ok(Block { start, size: region.len, dirty: if region.zeroed { 0 } else { region.len } })
    }

    /// Frees the large block at `address`; `false` where there is none.
    #[cold]
    #[inline(never)]
    pub(super) fn free_large(&self, address: usize) -> bool {
        match self.large.remove(address) {
            Some(region) => {
                self.release(region, region.len);
                true
            }
            None => false,
        }
    }

    /// Resizes a large block; `None` where the source cannot, and the block is as it was.
    pub(super) fn resize_large(&self, region: Region, new: usize, may_move: bool) -> Option<Resized> {
        let granularity = self.source.granularity();
        let len = round_up(new, granularity)?;
        let more = len.saturating_sub(region.len);
        if len == region.len {
            let block = NonNull::slice_from_raw_parts(region.base, len);
            return Some(Resized { block, zero_from: len });
        }
        if more > 0 && !self.charge(more) {
            return None;
        }
        self.source_calls.fetch_add(1, Ordering::Relaxed);
        // Out of the table meanwhile: if it moves, the source may hand its old place to another thread.
        let removed = self.large.remove_for_now(region.start())?;
        // SAFETY: a region of ours; the caller gives its old address up if it moves.
        let resized = unsafe { self.source.resize(removed, len, may_move) };
        let now = resized.unwrap_or(removed);
        now.base.expose_provenance();
        self.large.insert(now, false);
        let uncharge = (region.len + more).saturating_sub(now.len);
        self.reserved.fetch_sub(uncharge, Ordering::Relaxed);
        resized?;
        let block = NonNull::slice_from_raw_parts(now.base, now.len);
        let zero_from = if now.zeroed { region.len.min(now.len) } else { now.len };
        Some(Resized { block, zero_from })
    }
}
