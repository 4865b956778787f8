//! Stream order: what must be waited for before a free range may be used, and the least that does it.
//!
//! A *lane* is a stream as one pool numbers it. Frees on a lane belong to its open *batch*. No event is
//! recorded at a free; when somebody else *wants* a range of the lane, the open batch is *sealed*: one event
//! is recorded, which covers every free of that batch and of all before it. Whoever wants a range of the
//! lane then waits for the earliest event that covers it, once: a lane that has waited for batch `n` of
//! another may use everything of the batches up to `n`.
//!
//! Invariants
//! 1. A range freed in batch `b` of a lane had all its work issued to that lane's stream before the event
//!    that seals a batch `>= b` is recorded.
//! 2. `done` grows only after the driver said that an event of that batch, or everything, is complete.
//! 3. `waited[l] = b` only after a wait of this lane for an event of lane `l` that covers `b` was issued.
//! 4. Batches of a lane number only ever grow, also when the number of a lane is given to another stream;
//!    they start anew only when everything that bears one is complete and clean.
//! 5. A closed lane has no open frees: its last batch is sealed or done.
//! 6. Nothing is recorded on, and nothing asked of, a lane that belongs to a graph capture.

#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::thread::ThreadId;

use super::driver::{Capture, Driver, RawEvent, RawStream};
use super::ranges::{CLEAN, FIRST, HOLE, MAX_BATCH, MAX_LANES, MIXED, Tag};
use crate::base::error::{Error, Result};

/// So many lanes are opened before vacant ones are looked for, and more only where few are: a search looks at all.
const ENOUGH: usize = if cfg!(test) { 6 } else { 64 };

/// One stream, as one pool sees it.
#[derive(Debug, Default)]
struct Lane {
    stream: Option<RawStream>,
    /// The number of the stream on its device, while the lane is open.
    slot: Option<u32>,
    /// The thread whose default stream this is: only that thread can name it.
    thread: Option<ThreadId>,
    /// The capture whose private memory this lane is.
    capture: Option<u64>,
    /// Frees go to this batch.
    open: u32,
    sealed: VecDeque<(u32, RawEvent)>,
    done: u32,
    /// `done` when its ranges were last made clean.
    cleaned: u32,
    waited: Vec<(u16, u32)>,
}

/// An ordering step that a test takes out, to see that the detector notices.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mutant {
    /// Records no event when a batch is sealed.
    NoRecord,
    /// Issues no wait.
    NoWait,
    /// Takes every event for complete.
    AlwaysDone,
    /// Waits for the first event of a lane, whether or not it covers the batch.
    FirstEvent,
    /// Believes that a wait covered the open batch as well.
    WaitedForOpen,
    /// Forgets the other users of a block.
    ForgetUsers,
    /// Waits only for the first of several users.
    OneUser,
    /// Forgets to seal a stream that goes away.
    NoSealAtClose,
    /// A lane number is given on without going past its old batches.
    KeepNumbers,
    /// A block freed in a capture does not wait for what its stream did before.
    ForgetBefore,
    /// A graph's block that is freed outside of the capture waits for the graph alone.
    ForgetOutside,
    /// What a capture uses is not kept from others.
    CaptureInPublic,
    /// A range that takes in neighbours keeps the batch it had before.
    JoinUnderOldBatch,
    /// What goes back from a cache is taken for complete.
    CleanCaches,
    /// All streams have one cache.
    OneCache,
    /// Pieces of memory are moved although work on them may be in flight.
    MoveBusy,
}

/// The lanes of a pool.
#[derive(Debug)]
pub(super) struct Order {
    lanes: Vec<Lane>,
    /// Lanes to be given on, to which nothing refers any more.
    vacant: Vec<u16>,
    /// With so many lanes vacant ones are looked for.
    enough: usize,
    /// The lane of each stream of the device; `CLEAN` for none.
    by_slot: Vec<u16>,
    /// By the number of the capture and the slot of the stream.
    captures: HashMap<(u64, u32), u16>,
    /// What a range of lane `MIXED` waits for, by the batch of its tag.
    mixed: Vec<Vec<(u16, u32)>>,
    mixed_vacant: Vec<u32>,
    spare: Vec<RawEvent>,
    #[cfg(test)]
    pub(super) mutant: Option<Mutant>,
}

impl Order {
    pub(super) fn new() -> Self {
        Self {
            lanes: std::iter::repeat_with(Lane::default).take(FIRST.into()).collect(),
            vacant: Vec::new(),
            enough: ENOUGH,
            by_slot: Vec::new(),
            captures: HashMap::new(),
            mixed: Vec::new(),
            mixed_vacant: Vec::new(),
            spare: Vec::new(),
            #[cfg(test)]
            mutant: None,
        }
    }

    #[cfg(test)]
    pub(super) fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    /// Streams that have a lane now.
    pub(super) fn streams(&self) -> usize {
        self.lanes.iter().filter(|lane| lane.stream.is_some()).count()
    }

    pub(super) fn lanes(&self) -> u16 {
        self.lanes.len() as u16
    }

    /// The lane of a stream, if it has one already.
    #[inline]
    pub(super) fn lane(&self, slot: u32) -> Option<u16> {
        self.by_slot.get(slot as usize).copied().filter(|&lane| lane != CLEAN)
    }

    /// A lane for a stream that has none; `unused` tells which lane numbers nothing refers to any more.
    pub(super) fn open_lane(
        &mut self,
        slot: u32,
        stream: RawStream,
        thread: Option<ThreadId>,
        unused: impl FnOnce() -> Vec<bool>,
    ) -> Result<u16> {
        let lane = self.vacant_lane(unused)?;
        let slots = slot as usize + 1;
        if self.by_slot.len() < slots {
            self.by_slot.resize(slots, CLEAN);
        }
        self.by_slot[slot as usize] = lane;
        let fresh = &mut self.lanes[lane as usize];
        (fresh.stream, fresh.slot, fresh.thread) = (Some(stream), Some(slot), thread);
        // Invariant 4: whatever was waited for or done under this number lies behind.
        #[cfg(test)]
        let past = u32::from(self.mutant != Some(Mutant::KeepNumbers));
        #[cfg(not(test))]
        let past = 1;
        fresh.open = fresh.open.max(fresh.done) + past;
        Ok(lane)
    }

    fn vacant_lane(&mut self, unused: impl FnOnce() -> Vec<bool>) -> Result<u16> {
        if self.vacant.is_empty() && self.is_full() {
            self.find_vacant(&unused());
        }
        if let Some(lane) = self.vacant.pop() {
            self.lanes[lane as usize].waited.clear();
            return Ok(lane);
        }
        if self.lanes.len() == MAX_LANES {
            return Err(Error::refused(
                "more than 4093 streams use this pool at once",
                "drop streams that are no longer needed, or share streams",
            ));
        }
        self.lanes.push(Lane { open: 1, ..Lane::default() });
        Ok(self.lanes.len() as u16 - 1)
    }

    /// Whether the next lane should rather be one that is given on.
    pub(super) fn is_full(&self) -> bool {
        self.lanes.len() >= self.enough
    }

    fn find_vacant(&mut self, unused: &[bool]) {
        let vacant = (FIRST..self.lanes()).filter(|&lane| {
            let state = &self.lanes[lane as usize];
            let idle = state.stream.is_none() && state.capture.is_none() && state.sealed.is_empty();
            idle && unused[lane as usize] && state.open < MAX_BATCH - 1
        });
        self.vacant.extend(vacant);
        // So each look pays: it finds many, or is not taken soon again.
        if self.vacant.len() < self.enough / 4 {
            self.enough = (2 * self.enough).min(MAX_LANES);
        }
    }

    /// The private lane of a stream in a capture: branches of a graph run at the same time, so each reuses what it
    /// freed itself.
    pub(super) fn capture_lane(
        &mut self,
        id: u64,
        slot: u32,
        unused: impl FnOnce() -> Vec<bool>,
    ) -> Result<u16> {
        if let Some(&lane) = self.captures.get(&(id, slot)) {
            return Ok(lane);
        }
        let lane = self.vacant_lane(unused)?;
        let state = &mut self.lanes[lane as usize];
        state.capture = Some(id);
        state.open = state.open.max(state.done) + 1;
        self.captures.insert((id, slot), lane);
        Ok(lane)
    }

    /// Ends the privacy of a capture: its work is complete. Returns whether it had memory.
    pub(super) fn end_capture(&mut self, id: u64) -> bool {
        let ended: Vec<u16> =
            self.captures.extract_if(|&(of, _), _| of == id).map(|(_, lane)| lane).collect();
        for &lane in &ended {
            let state = &mut self.lanes[lane as usize];
            state.capture = None;
            state.done = state.open;
        }
        !ended.is_empty()
    }

    /// Whether both lanes belong to one capture.
    pub(super) fn same_capture(&self, one: u16, other: u16) -> bool {
        let of = |lane: u16| self.lanes[lane as usize].capture;
        of(one).is_some() && of(one) == of(other)
    }

    /// Whether the lane is the private memory of a capture.
    #[inline]
    pub(super) fn is_capture(&self, lane: u16) -> bool {
        self.lanes[lane as usize].capture.is_some()
    }

    /// The tag of a range that is freed on `lane` now.
    #[inline]
    pub(super) fn tag_now(&self, lane: u16) -> Tag {
        Tag { lane, batch: self.lanes[lane as usize].open }
    }

    /// Whether the host knows that the range is free for everybody.
    pub(super) fn is_done(&self, tag: Tag) -> bool {
        match tag.lane {
            CLEAN => true,
            HOLE => false,
            MIXED => {
                self.mixed[tag.batch as usize].iter().all(|&(lane, batch)| self.is_done(Tag { lane, batch }))
            }
            lane => {
                let state = &self.lanes[lane as usize];
                state.capture.is_none() && state.done >= tag.batch
            }
        }
    }

    /// Whether ranges of the lane may have become free for everybody since this was last asked: more of it is done, or
    /// what is freed on it is done at once.
    pub(super) fn more_done(&mut self, lane: u16) -> bool {
        let state = &mut self.lanes[lane as usize];
        std::mem::replace(&mut state.cleaned, state.done) != state.done || state.open <= state.done
    }

    fn waited(&self, by: u16, of: u16) -> u32 {
        let waited = &self.lanes[by as usize].waited;
        waited.iter().find(|&&(lane, _)| lane == of).map_or(0, |&(_, batch)| batch)
    }

    /// Whether `by` may use the range as things are, without any call.
    pub(super) fn may_use(&self, by: u16, tag: Tag) -> bool {
        if tag.lane == by || self.is_done(tag) {
            return true;
        }
        by >= FIRST && tag.lane >= FIRST && self.waited(by, tag.lane) >= tag.batch
    }

    /// Whether no wait makes the range usable: it is in somebody's private memory, or there is none.
    pub(super) fn is_private(&self, tag: Tag) -> bool {
        match tag.lane {
            CLEAN => false,
            HOLE => true,
            MIXED => self.mixed[tag.batch as usize].iter().any(|&(lane, _)| self.is_capture(lane)),
            lane => self.is_capture(lane),
        }
    }

    /// Seals the open batch of a lane: one event covers all frees so far. Returns the batch it covers.
    pub(super) fn seal(&mut self, driver: &dyn Driver, lane: u16) -> Result<u32> {
        let state = &self.lanes[lane as usize];
        let Some(stream) = state.stream else { return Ok(state.open) };
        if state.capture.is_some() {
            return Err(Error::refused("memory of a graph capture was wanted", "drop the graph first"));
        }
        if state.thread.is_some_and(|owner| owner != std::thread::current().id()) {
            return Err(Error::refused(
                "the default stream of another thread cannot be waited for",
                "free on a stream of its own, or let that thread synchronise",
            ));
        }
        if state.open == MAX_BATCH {
            return Err(Error::refused(
                "the numbers of a stream's batches ran out",
                "synchronise the device",
            ));
        }
        // A record on a stream that is being captured would become part of the graph (invariant 6).
        if driver.capture_state(stream)? == Capture::Active {
            return Err(Error::refused("the stream is being captured into a graph", "end the capture first"));
        }
        let event = match self.spare.pop() {
            Some(event) => event,
            None => driver.event_create()?,
        };
        #[cfg(test)]
        let recorded = if self.is(Mutant::NoRecord) { Ok(()) } else { driver.event_record(event, stream) };
        #[cfg(not(test))]
        let recorded = driver.event_record(event, stream);
        if let Err(error) = recorded {
            self.spare.push(event);
            return Err(error);
        }
        let state = &mut self.lanes[lane as usize];
        let batch = state.open;
        state.sealed.push_back((batch, event));
        state.open += 1;
        Ok(batch)
    }

    /// Lanes whose batch numbers run out (after a million seals): waits until everything freed on them so far
    /// is complete. The caller makes that clean, then calls [`renumber`](Self::renumber).
    pub(super) fn finish_full(&mut self, driver: &dyn Driver) -> Vec<u16> {
        let mut full = Vec::new();
        for lane in FIRST..self.lanes() {
            let state = &self.lanes[lane as usize];
            let Some(stream) = state.stream.filter(|_| state.open + 2 >= MAX_BATCH) else { continue };
            let free = state.thread.is_none() && driver.capture_state(stream) == Ok(Capture::None);
            if free && driver.stream_sync(stream).is_ok() {
                let state = &mut self.lanes[lane as usize];
                state.done = state.open;
                let spent = state.sealed.drain(..).map(|(_, event)| event);
                self.spare.extend(spent);
                full.push(lane);
            }
        }
        full
    }

    /// Starts the batch numbers of a lane anew; no range bears one of them any more.
    pub(super) fn renumber(&mut self, lane: u16) {
        let state = &mut self.lanes[lane as usize];
        (state.open, state.done, state.cleaned) = (1, 0, 0);
        for other in &mut self.lanes {
            other.waited.retain(|&(of, _)| of != lane);
        }
        for (_, batch) in self.mixed.iter_mut().flatten().filter(|(of, _)| *of == lane) {
            *batch = 0;
        }
    }

    /// Orders lane `by` after the work that a range waits for, with as few calls as will do.
    pub(super) fn ensure(&mut self, driver: &dyn Driver, by: u16, tag: Tag) -> Result<()> {
        if tag.lane == MIXED {
            for index in 0..self.mixed[tag.batch as usize].len() {
                let (lane, batch) = self.mixed[tag.batch as usize][index];
                self.ensure(driver, by, Tag { lane, batch })?;
                #[cfg(test)]
                if self.is(Mutant::OneUser) {
                    break;
                }
            }
            return Ok(());
        }
        if self.may_use(by, tag) {
            return Ok(());
        }
        let Some(stream) = self.lanes[by as usize].stream else {
            return Err(Error::refused("the stream is gone", "use another"));
        };
        if self.lanes[tag.lane as usize].open <= tag.batch {
            self.seal(driver, tag.lane)?;
        }
        #[cfg(test)]
        let covers = |batch: u32| batch >= tag.batch || self.is(Mutant::FirstEvent);
        #[cfg(not(test))]
        let covers = |batch: u32| batch >= tag.batch;
        let sealed = &self.lanes[tag.lane as usize].sealed;
        let Some(&(batch, event)) = sealed.iter().find(|&&(batch, _)| covers(batch)) else {
            return Err(Error::refused("an event is missing", "report this as a bug"));
        };
        #[cfg(test)]
        let waited = if self.is(Mutant::NoWait) { Ok(()) } else { driver.stream_wait(stream, event) };
        #[cfg(not(test))]
        let waited = driver.stream_wait(stream, event);
        waited?;
        #[cfg(test)]
        let batch = if self.is(Mutant::WaitedForOpen) { self.lanes[tag.lane as usize].open } else { batch };
        let waited = &mut self.lanes[by as usize].waited;
        match waited.iter_mut().find(|(lane, _)| *lane == tag.lane) {
            Some(entry) => entry.1 = entry.1.max(batch),
            None => waited.push((tag.lane, batch)),
        }
        Ok(())
    }

    /// Asks the driver which events are complete; returns whether any was. A query that fails counts as no.
    pub(super) fn poll(&mut self, driver: &dyn Driver) -> bool {
        let mut progress = false;
        #[cfg(test)]
        let always = self.is(Mutant::AlwaysDone);
        #[cfg(not(test))]
        let always = false;
        for lane in &mut self.lanes {
            while let Some(&(batch, event)) = lane.sealed.front() {
                if !always && !driver.event_query(event).unwrap_or(false) {
                    break;
                }
                lane.sealed.pop_front();
                lane.done = batch;
                self.spare.push(event);
                progress = true;
            }
        }
        progress
    }

    /// Seals every lane that `wanted` names, as far as that can be done.
    pub(super) fn seal_all(&mut self, driver: &dyn Driver, wanted: impl Fn(u16) -> bool) {
        for lane in FIRST..self.lanes() {
            let state = &self.lanes[lane as usize];
            if state.stream.is_some() && state.capture.is_none() && wanted(lane) {
                // A lane that cannot be sealed now stays as it is.
                let _ = self.seal(driver, lane);
            }
        }
    }

    /// The latest events of all lanes: who waits for them waits for everything sealed.
    pub(super) fn last_events(&self) -> Vec<RawEvent> {
        self.lanes.iter().filter_map(|lane| lane.sealed.back().map(|&(_, event)| event)).collect()
    }

    /// The last event on a lane that is not known to be complete.
    pub(super) fn last_event(&self, lane: u16) -> Option<RawEvent> {
        self.lanes[lane as usize].sealed.back().map(|&(_, event)| event)
    }

    /// A stream goes away; what was freed on it is covered by one last event.
    pub(super) fn close(&mut self, driver: &dyn Driver, slot: u32) {
        let Some(lane) = self.lane(slot) else { return };
        self.by_slot[slot as usize] = CLEAN;
        #[cfg(test)]
        if self.is(Mutant::NoSealAtClose) {
            let open = self.lanes[lane as usize].open;
            self.lanes[lane as usize].done = open;
            self.lanes[lane as usize].stream = None;
            return;
        }
        let sealed = self.seal(driver, lane);
        // Without the event, wait; if even that fails the context is broken and the memory stays out of use.
        let waited = sealed.is_err() && driver.device_sync().is_ok();
        let state = &mut self.lanes[lane as usize];
        state.stream = None;
        state.slot = None;
        if sealed.is_ok() {
            // Later frees of blocks that still bear this lane are covered by the same event.
            state.open = state.sealed.back().map_or(state.open, |&(batch, _)| batch);
        } else if waited {
            state.done = state.open;
        }
    }

    /// The tag of a block freed on `lane` that the lanes `users` used as well: each of them is sealed now, so
    /// that the wait is for no later work of theirs.
    pub(super) fn tag_shared(&mut self, driver: &dyn Driver, lane: u16, users: Vec<(u16, u32)>) -> Tag {
        #[cfg(test)]
        if self.is(Mutant::ForgetUsers) {
            return self.tag_now(lane);
        }
        let mut waits = users;
        for (user, batch) in &mut waits {
            // If the record fails, the open batch still stands for the use: it is sealed when wanted.
            *batch = self.seal(driver, *user).unwrap_or(self.lanes[*user as usize].open);
        }
        if lane >= FIRST {
            waits.push((lane, self.lanes[lane as usize].open));
        }
        let index = self.mixed_vacant.pop().unwrap_or_else(|| {
            self.mixed.push(Vec::new());
            self.mixed.len() as u32 - 1
        });
        self.mixed[index as usize] = waits;
        Tag { lane: MIXED, batch: index }
    }

    /// A range of lane `MIXED` is no more; its list is free again.
    pub(super) fn forget_mixed(&mut self, tag: Tag) {
        if tag.lane == MIXED {
            self.mixed[tag.batch as usize].clear();
            self.mixed_vacant.push(tag.batch);
        }
    }

    /// The lists of lane `MIXED` that wait for nothing any more.
    pub(super) fn mixed_done(&self) -> Vec<u32> {
        let all = 0..self.mixed.len() as u32;
        all.filter(|&batch| {
            !self.mixed[batch as usize].is_empty() && self.is_done(Tag { lane: MIXED, batch })
        })
        .collect()
    }

    /// All events, for the pool's end.
    pub(super) fn take_events(&mut self) -> Vec<RawEvent> {
        let mut events = std::mem::take(&mut self.spare);
        for lane in &mut self.lanes {
            events.extend(lane.sealed.drain(..).map(|(_, event)| event));
        }
        events
    }
}
