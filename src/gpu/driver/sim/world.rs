//! The state of a group of simulated devices: streams, events, captures, the executor and the clock.
//!
//! Invariants
//! 1. Operations of a stream have consecutive numbers; `done` of them ran, the rest wait in `queue`.
//! 2. An operation depends only on operations issued before it, so the graph has no cycle and some head is
//!    always ready while any queue is not empty.
//! 3. Everything random comes from `rng`, and everything runs on the thread that calls in, under one lock:
//!    a seed and a sequence of calls determine the run.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::thread::ThreadId;

use super::detector::{Access, Clock, Detector, HOST, Hazard, HazardKind};
use super::memory::Memory;
use super::{Kernel, SimConfig, Touch};
use crate::base::error::{Error, Result};
use crate::gpu::driver::RawStream;

/// `CUresult` values that the simulated device answers with.
pub(super) mod code {
    pub(crate) const INVALID_VALUE: i32 = 1;
    pub(crate) const OUT_OF_MEMORY: i32 = 2;
    pub(crate) const INVALID_HANDLE: i32 = 400;
    pub(crate) const NOT_SUPPORTED: i32 = 801;
    pub(crate) const CAPTURE_UNSUPPORTED: i32 = 900;
    pub(crate) const CAPTURE_INVALIDATED: i32 = 901;
    pub(crate) const CAPTURED_EVENT: i32 = 907;
}

/// The first raw stream that is not a reserved name.
const FIRST_STREAM: usize = 16;

/// A function to run once, shared so that an operation can be cloned.
pub(super) type HostCall = Arc<std::sync::Mutex<Option<Box<dyn FnOnce() + Send>>>>;

#[derive(Clone)]
pub(super) enum Act {
    Nothing,
    Copy { dst: usize, src: usize, bytes: usize },
    Fill { dst: usize, byte: u8, bytes: usize },
    Kernel(Kernel),
    Host(HostCall),
}

#[derive(Clone)]
pub(super) struct Op {
    pub(super) act: Act,
    pub(super) touches: Vec<Touch>,
    pub(super) ns: u64,
}

struct Queued {
    op: Op,
    deps: Vec<(usize, u64)>,
    issued_ns: u64,
}

#[derive(Default)]
struct Stream {
    device: usize,
    /// Ordered with the legacy default stream.
    blocking: bool,
    destroyed: bool,
    queue: VecDeque<Queued>,
    issued: u64,
    done: u64,
    clock: Clock,
    capture: Option<usize>,
    ready_ns: u64,
}

#[derive(Clone, Default)]
struct Event {
    at: Option<(usize, u64)>,
    clock: Clock,
    capture: Option<usize>,
    destroyed: bool,
}

struct Recording {
    origin: usize,
    streams: Vec<usize>,
    ops: Vec<Op>,
    invalid: bool,
    began: u64,
    /// The last launch on each stream.
    launches: Vec<(usize, u64)>,
    /// To be told when the graph is gone.
    ends: Vec<Box<dyn FnOnce() + Send>>,
}

pub(super) struct World {
    pub(super) config: SimConfig,
    rng: u64,
    pub(super) memory: Memory,
    streams: Vec<Stream>,
    per_thread: HashMap<(usize, ThreadId), usize>,
    events: Vec<Event>,
    recordings: Vec<Recording>,
    pub(super) detector: Detector,
    host: Clock,
    pub(super) now_ns: u64,
    pub(super) calls: u64,
    pub(super) by_name: BTreeMap<&'static str, u64>,
    /// Call number to fail at, and the code.
    pub(super) fault: Option<(u64, i32)>,
}

impl World {
    /// Streams `0..devices` are the legacy default streams.
    pub(super) fn new(config: SimConfig, devices: usize) -> Self {
        let mut memory = Memory::default();
        memory.used = vec![0; devices];
        let streams = (0..devices).map(|device| Stream { device, ..Stream::default() }).collect();
        Self {
            rng: config.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            detector: Detector::new(config.detector),
            config,
            memory,
            streams,
            per_thread: HashMap::new(),
            events: Vec::new(),
            recordings: Vec::new(),
            host: Clock::default(),
            now_ns: 0,
            calls: 0,
            by_name: BTreeMap::new(),
            fault: None,
        }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        (self.rng >> 11) % below.max(1)
    }

    /// Every driver call begins here: it is counted and costed, may fail on demand, and lets the devices
    /// work on a little.
    pub(super) fn enter(&mut self, call: &'static str, cost_ns: u64) -> Result<()> {
        self.calls += 1;
        *self.by_name.entry(call).or_default() += 1;
        self.now_ns += cost_ns;
        if let Some((at, code)) = self.fault
            && at == self.calls
        {
            self.fault = None;
            return Err(Error::Cuda { code, call });
        }
        if self.random(256) < u64::from(self.config.eagerness) {
            self.run_one();
        }
        Ok(())
    }

    pub(super) fn resolve(&mut self, device: usize, raw: RawStream, call: &'static str) -> Result<usize> {
        let index = match raw {
            RawStream(0) | RawStream::LEGACY => device,
            RawStream::PER_THREAD => {
                let key = (device, std::thread::current().id());
                match self.per_thread.get(&key) {
                    Some(&index) => index,
                    None => {
                        let index = self.add_stream(device, true);
                        self.per_thread.insert(key, index);
                        index
                    }
                }
            }
            RawStream(raw) => raw.wrapping_sub(FIRST_STREAM),
        };
        match self.streams.get(index) {
            Some(stream) if !stream.destroyed => Ok(index),
            _ => Err(Error::Cuda { code: code::INVALID_HANDLE, call }),
        }
    }

    fn add_stream(&mut self, device: usize, blocking: bool) -> usize {
        self.streams.push(Stream { device, blocking, ..Stream::default() });
        self.streams.len() - 1
    }

    pub(super) fn create_stream(&mut self, device: usize) -> RawStream {
        RawStream(self.add_stream(device, false) + FIRST_STREAM)
    }

    pub(super) fn destroy_stream(&mut self, index: usize) {
        self.streams[index].destroyed = true;
    }

    /// Issues work to a stream, or records it where the stream is being captured.
    pub(super) fn issue(&mut self, index: usize, op: Op, call: &'static str) -> Result<()> {
        if let Some(recording) = self.streams[index].capture {
            if matches!(op.act, Act::Host(_)) {
                return Err(Error::Cuda { code: code::NOT_SUPPORTED, call });
            }
            self.recordings[recording].ops.push(op);
            return Ok(());
        }
        self.queue(index, op, Vec::new(), None);
        Ok(())
    }

    fn queue(&mut self, index: usize, op: Op, mut deps: Vec<(usize, u64)>, graph: Option<(usize, u64)>) {
        let device = self.streams[index].device;
        let others: Vec<usize> = if index == device {
            let same = |i: &usize| self.streams[*i].device == device && self.streams[*i].blocking;
            (0..self.streams.len()).filter(same).collect()
        } else if self.streams[index].blocking {
            vec![device]
        } else {
            Vec::new()
        };
        let mut clock = std::mem::take(&mut self.streams[index].clock);
        clock.join(&self.host);
        for other in others {
            deps.push((other, self.streams[other].issued));
            clock.join(&self.streams[other].clock);
            clock.advance(other, self.streams[other].issued);
        }
        let seq = self.streams[index].issued + 1;
        for touch in &op.touches {
            let by = Access { stream: index, seq, clock: &clock, write: touch.write, graph };
            self.detector.access(touch.address, touch.len, by);
        }
        clock.advance(index, seq);
        let issued_ns = self.now_ns;
        let stream = &mut self.streams[index];
        stream.clock = clock;
        stream.issued = seq;
        stream.queue.push_back(Queued { op, deps, issued_ns });
    }

    fn ready(&self, index: usize) -> bool {
        self.streams[index]
            .queue
            .front()
            .is_some_and(|head| head.deps.iter().all(|&(stream, seq)| self.streams[stream].done >= seq))
    }

    /// Runs the head of a stream that is ready, chosen at random; false where every queue is empty.
    fn run_one(&mut self) -> bool {
        let ready: Vec<usize> = (0..self.streams.len()).filter(|&index| self.ready(index)).collect();
        if ready.is_empty() {
            return false;
        }
        let pick = self.random(ready.len() as u64) as usize;
        let index = ready[pick];
        let Some(head) = self.streams[index].queue.pop_front() else { return false };
        let after = head.deps.iter().map(|&(stream, _)| self.streams[stream].ready_ns).max().unwrap_or(0);
        let stream = &mut self.streams[index];
        stream.ready_ns = stream.ready_ns.max(head.issued_ns).max(after) + head.op.ns;
        stream.done += 1;
        self.run(head.op, index);
        true
    }

    fn run(&mut self, op: Op, stream: usize) {
        let (mapped, at) = match op.act {
            Act::Nothing => (true, 0),
            // SAFETY: who issued the copy vouched for both ranges until it ran (Driver::copy).
            Act::Copy { dst, src, bytes } => (unsafe { self.memory.copy(dst, src, bytes) }, dst),
            // SAFETY: as above (Driver::fill).
            Act::Fill { dst, byte, bytes } => (unsafe { self.memory.fill(dst, byte, bytes) }, dst),
            Act::Kernel(kernel) => {
                kernel(&super::SimMemory { memory: &self.memory });
                (true, 0)
            }
            Act::Host(call) => {
                let call = call.lock().ok().and_then(|mut slot| slot.take());
                if let Some(call) = call {
                    call();
                }
                (true, 0)
            }
        };
        if !mapped {
            let hazard = Hazard { kind: HazardKind::Unmapped, address: at, earlier: stream, later: stream };
            self.detector.found.push(hazard);
        }
    }

    /// Runs until stream `index` has done operation `seq`, whatever else runs meanwhile.
    fn run_to(&mut self, index: usize, seq: u64) {
        while self.streams[index].done < seq && self.run_one() {}
        self.now_ns = self.now_ns.max(self.streams[index].ready_ns);
    }

    pub(super) fn run_all(&mut self) {
        while self.run_one() {}
    }

    /// The host has seen everything complete.
    pub(super) fn sync_device(&mut self, device: usize) {
        for index in 0..self.streams.len() {
            if self.streams[index].device == device {
                self.run_to(index, self.streams[index].issued);
                self.see(index);
            }
        }
    }

    fn see(&mut self, index: usize) {
        let clock = self.streams[index].clock.clone();
        self.host.join(&clock);
    }

    fn refuse_capture(&mut self, index: usize, call: &'static str) -> Result<()> {
        if let Some(recording) = self.streams[index].capture {
            self.recordings[recording].invalid = true;
            return Err(Error::Cuda { code: code::CAPTURE_UNSUPPORTED, call });
        }
        Ok(())
    }

    pub(super) fn sync_stream(&mut self, index: usize, call: &'static str) -> Result<()> {
        self.refuse_capture(index, call)?;
        self.run_to(index, self.streams[index].issued);
        self.see(index);
        Ok(())
    }

    pub(super) fn query_stream(&mut self, index: usize, call: &'static str) -> Result<bool> {
        self.refuse_capture(index, call)?;
        self.work_on();
        let done = self.streams[index].queue.is_empty();
        if done {
            self.see(index);
        }
        Ok(done)
    }

    /// A query gives the devices time, so that a loop of queries ends.
    fn work_on(&mut self) {
        for _ in 0..self.random(3) {
            self.run_one();
        }
    }

    pub(super) fn create_event(&mut self) -> usize {
        self.events.push(Event::default());
        self.events.len() - 1
    }

    fn event(&self, event: usize, call: &'static str) -> Result<&Event> {
        let found = self.events.get(event).filter(|event| !event.destroyed);
        found.ok_or(Error::Cuda { code: code::INVALID_HANDLE, call })
    }

    pub(super) fn destroy_event(&mut self, event: usize, call: &'static str) -> Result<()> {
        self.event(event, call)?;
        self.events[event].destroyed = true;
        Ok(())
    }

    pub(super) fn record(&mut self, event: usize, index: usize, call: &'static str) -> Result<()> {
        self.event(event, call)?;
        let stream = &self.streams[index];
        let mut clock = stream.clock.clone();
        clock.join(&self.host);
        let at = stream.capture.is_none().then_some((index, stream.issued));
        self.events[event] = Event { at, clock, capture: stream.capture, destroyed: false };
        Ok(())
    }

    pub(super) fn wait(&mut self, index: usize, event: usize, call: &'static str) -> Result<()> {
        let event = self.event(event, call)?.clone();
        if let Some(recording) = event.capture {
            // Waiting for captured work draws the stream into the capture.
            match self.streams[index].capture {
                None => {
                    self.streams[index].capture = Some(recording);
                    self.recordings[recording].streams.push(index);
                }
                Some(mine) if mine == recording => {}
                Some(_) => return Err(Error::Cuda { code: code::INVALID_VALUE, call }),
            }
            return Ok(());
        }
        if self.streams[index].capture.is_some() {
            // An event from outside: the graph cannot wait for it.
            return Err(Error::Cuda { code: code::CAPTURE_UNSUPPORTED, call });
        }
        self.streams[index].clock.join(&event.clock);
        let deps = event.at.into_iter().collect();
        self.queue(index, Op { act: Act::Nothing, touches: Vec::new(), ns: 0 }, deps, None);
        Ok(())
    }

    fn refuse_captured(&mut self, event: usize, call: &'static str) -> Result<Event> {
        let state = self.event(event, call)?.clone();
        if let Some(recording) = state.capture {
            self.recordings[recording].invalid = true;
            return Err(Error::Cuda { code: code::CAPTURED_EVENT, call });
        }
        Ok(state)
    }

    pub(super) fn query_event(&mut self, event: usize, call: &'static str) -> Result<bool> {
        let state = self.refuse_captured(event, call)?;
        self.work_on();
        let done = state.at.is_none_or(|(stream, seq)| self.streams[stream].done >= seq);
        if done {
            self.host.join(&state.clock);
        }
        Ok(done)
    }

    pub(super) fn sync_event(&mut self, event: usize, call: &'static str) -> Result<()> {
        let state = self.refuse_captured(event, call)?;
        if let Some((stream, seq)) = state.at {
            self.run_to(stream, seq);
        }
        self.host.join(&state.clock);
        Ok(())
    }

    pub(super) fn capturing(&self, index: usize) -> Option<usize> {
        self.streams[index].capture
    }

    pub(super) fn begin_capture(&mut self, index: usize, call: &'static str) -> Result<()> {
        // The legacy stream cannot be captured.
        if self.streams[index].capture.is_some() || index == self.streams[index].device {
            return Err(Error::Cuda { code: code::CAPTURE_UNSUPPORTED, call });
        }
        let began = self.detector.tick();
        let streams = vec![index];
        self.recordings.push(Recording {
            origin: index,
            streams,
            ops: Vec::new(),
            invalid: false,
            began,
            launches: Vec::new(),
            ends: Vec::new(),
        });
        self.streams[index].capture = Some(self.recordings.len() - 1);
        Ok(())
    }

    pub(super) fn end_capture(&mut self, index: usize, call: &'static str) -> Result<usize> {
        let recording = self.streams[index].capture.ok_or(Error::Cuda { code: code::INVALID_VALUE, call })?;
        if self.recordings[recording].origin != index {
            return Err(Error::Cuda { code: code::INVALID_VALUE, call });
        }
        for stream in std::mem::take(&mut self.recordings[recording].streams) {
            self.streams[stream].capture = None;
        }
        if self.recordings[recording].invalid {
            self.forget_graph(recording);
            return Err(Error::Cuda { code: code::CAPTURE_INVALIDATED, call });
        }
        Ok(recording)
    }

    pub(super) fn on_graph_end(
        &mut self,
        index: usize,
        end: Box<dyn FnOnce() + Send>,
        call: &'static str,
    ) -> Result<()> {
        let recording = self.streams[index].capture.ok_or(Error::Cuda { code: code::INVALID_VALUE, call })?;
        self.recordings[recording].ends.push(end);
        Ok(())
    }

    /// Replays a graph, in the order in which it was recorded.
    pub(super) fn launch(&mut self, graph: usize, index: usize, call: &'static str) -> Result<()> {
        let recording = self.recordings.get(graph).ok_or(Error::Cuda { code: code::INVALID_HANDLE, call })?;
        let began = recording.began;
        for op in recording.ops.clone() {
            self.queue(index, op, Vec::new(), Some((graph, began)));
        }
        let issued = self.streams[index].issued;
        self.recordings[graph].launches.push((index, issued));
        Ok(())
    }

    pub(super) fn forget_graph(&mut self, graph: usize) {
        if let Some(recording) = self.recordings.get_mut(graph) {
            recording.ops = Vec::new();
            let (launches, ends) =
                (std::mem::take(&mut recording.launches), std::mem::take(&mut recording.ends));
            if ends.is_empty() {
                return;
            }
            // Who hears of the end hears of it after the last launch.
            for (stream, seq) in launches {
                self.run_to(stream, seq);
                self.see(stream);
            }
            ends.into_iter().for_each(|end| _ = std::thread::spawn(end));
        }
    }

    /// A pool hands out a block for `stream`, or for the CPU.
    pub(super) fn taken(&mut self, addr: usize, len: usize, stream: Option<usize>) {
        let mut clock = self.host.clone();
        let mut capture = None;
        if let Some(index) = stream {
            capture = self.streams[index].capture;
            if capture.is_none() {
                clock.join(&self.streams[index].clock);
            }
        }
        // What a graph touches runs whenever it is launched, on any stream: only what the host has seen
        // complete is ordered before it. (Earlier touches by the same graph are not tracked while captured.)
        let party = if capture.is_some() { HOST } else { stream.unwrap_or(HOST) };
        for (at, len) in self.memory.elsewhere(addr, len) {
            self.detector.reused(at, len, party, &clock);
        }
        self.detector.taken(addr, len, party, &clock, capture);
    }

    /// Physical memory behind a range goes away.
    pub(super) fn given_back(&mut self, addr: usize, len: usize) {
        let host = self.host.clone();
        self.detector.given_back(addr, len, &host);
    }
}
