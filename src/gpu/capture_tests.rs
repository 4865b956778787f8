//! Captures under thousands of schedules: random programs that capture graphs of one or two branches, launch them on
//! any stream and use what they leave, while other streams go on. Then the same with one step taken out at a time. The
//! device runs the branches of a graph one after the other, so that they share nothing is shown elsewhere, by addresses.

use std::ptr::NonNull;

use super::driver::sim::{SimConfig, Simulation, Touch};
use super::order::Mutant;
use super::{DevicePool, GpuDevice, Graph, Stream};
use crate::base::config::PoolConfig;

const STREAMS: usize = 3;

struct Live {
    address: usize,
    bytes: usize,
    home: usize,
}

/// A graph, what it writes and is read outside of it, and the stream of its last launch.
struct Captured {
    graph: Graph,
    outputs: Vec<Live>,
    last: Option<usize>,
}

struct Program {
    random: u64,
    sim: Simulation,
    pool: DevicePool,
    streams: Vec<Stream>,
    live: Vec<Live>,
    graphs: Vec<Captured>,
}

impl Program {
    fn below(&mut self, limit: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        ((self.random >> 11) % limit as u64) as usize
    }

    /// A block for work on a stream, which writes it.
    fn take(&mut self, at: usize) -> Option<Live> {
        let bytes = 1 + self.below(12 << 10);
        let block = self.pool.allocate_async(bytes, &self.streams[at]).ok()?;
        let live = Live { address: block.as_ptr() as usize, bytes, home: at };
        self.touch(&live, at, true);
        Some(live)
    }

    fn touch(&self, block: &Live, at: usize, writes: bool) {
        let touch = if writes { Touch::write } else { Touch::read };
        self.sim.launch(&self.streams[at], 1000, &[touch(block.address, block.bytes)], |_| ()).unwrap();
    }

    fn free(&self, block: &Live) {
        let address = NonNull::new(block.address as *mut _).unwrap();
        // SAFETY: live, freed once, and all work on it is ordered before what its home stream does next.
        unsafe { self.pool.try_deallocate_async(address, &self.streams[block.home]) }.unwrap();
    }

    /// Captures a graph on one stream, or on two that part and meet.
    fn capture(&mut self, at: usize) {
        let origin = self.streams[at].clone();
        let side = (at + 1) % STREAMS;
        let branches = self.below(2) == 0;
        let mut outputs = Vec::new();
        let mut inside: Vec<Live> = Vec::new();
        let capture = origin.begin_capture().unwrap();
        if branches {
            self.streams[side].wait_for(&origin).unwrap();
        }
        for _ in 0..2 + self.below(8) {
            let on = if branches && self.below(2) == 0 { side } else { at };
            match self.below(6) {
                0..=2 => inside.extend(self.take(on)),
                3 if !inside.is_empty() => {
                    let block = inside.swap_remove(self.below(inside.len()));
                    self.free(&block);
                }
                4 => {
                    // A block from before the capture is freed in it.
                    if let Some(index) = self.live.iter().position(|block| block.home == on) {
                        let block = self.live.swap_remove(index);
                        self.free(&block);
                    }
                }
                _ => {
                    // Somebody else goes on meanwhile.
                    let other = (at + 2) % STREAMS;
                    let block = self.take(other);
                    self.live.extend(block);
                }
            }
        }
        if branches {
            origin.wait_for(&self.streams[side]).unwrap();
        }
        for block in inside {
            if block.home == at && self.below(2) == 0 {
                outputs.push(block);
            } else {
                self.free(&block);
            }
        }
        self.graphs.push(Captured { graph: capture.end().unwrap(), outputs, last: None });
    }

    /// Launches a graph after its launch before; work of another stream then reads what it left.
    fn launch(&mut self, which: usize) {
        let (on, reader) = (self.below(STREAMS), self.below(STREAMS));
        let (launched, read) = (self.streams[on].clone(), self.streams[reader].clone());
        if let Some(last) = self.graphs[which].last.replace(reader) {
            launched.wait_for(&self.streams[last]).unwrap();
        }
        self.graphs[which].graph.launch(&launched).unwrap();
        read.wait_for(&launched).unwrap();
        for index in 0..self.graphs[which].outputs.len() {
            self.touch(&self.graphs[which].outputs[index], reader, false);
        }
    }

    /// Frees what a graph left, after its last reader, and lets go of the graph.
    fn finish(&mut self, which: usize) {
        let Captured { graph, outputs, last } = self.graphs.swap_remove(which);
        for block in &outputs {
            if let Some(last) = last {
                self.streams[block.home].wait_for(&self.streams[last]).unwrap();
            }
            self.free(block);
        }
        drop(graph);
    }

    fn step(&mut self) {
        let at = self.below(STREAMS);
        match self.below(16) {
            0..=4 => {
                let block = self.take(at);
                self.live.extend(block);
            }
            5..=8 if !self.live.is_empty() => {
                let index = self.below(self.live.len());
                let block = self.live.swap_remove(index);
                self.free(&block);
            }
            9 | 10 if self.graphs.len() < 3 => self.capture(at),
            11..=13 if !self.graphs.is_empty() => {
                let which = self.below(self.graphs.len());
                self.launch(which);
            }
            14 if !self.graphs.is_empty() => {
                let which = self.below(self.graphs.len());
                self.finish(which);
            }
            15 => _ = self.pool.trim(0).unwrap(),
            _ => {}
        }
    }
}

/// One random program; returns how many hazards the device saw.
fn program(seed: u64, mutant: Option<Mutant>) -> usize {
    let eagerness = [0, 8, 64][seed as usize % 3];
    let gpu = GpuDevice::simulated(SimConfig::default().seed(seed).eagerness(eagerness).memory(64 << 20));
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(128 << 10)).unwrap();
    pool.inner.core.lock().order.mutant = mutant;
    let mut program = Program {
        random: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
        sim: gpu.simulation().unwrap(),
        pool,
        streams: (0..STREAMS).map(|_| gpu.new_stream().unwrap()).collect(),
        live: Vec::new(),
        graphs: Vec::new(),
    };
    for _ in 0..80 {
        program.step();
        program.pool.check().unwrap();
    }
    while !program.graphs.is_empty() {
        program.finish(0);
    }
    program.live.iter().for_each(|block| program.free(block));
    assert!(!program.pool.has_leaks());
    program.sim.run_all();
    if mutant.is_none() {
        program.sim.hazards().iter().for_each(|hazard| eprintln!("seed {seed}: {hazard}"));
    }
    program.sim.hazards().len()
}

#[test]
fn no_schedule_lets_a_graph_meet_others() {
    for seed in 0..2000 {
        assert_eq!(program(seed, None), 0, "seed {seed}");
    }
}

#[test]
fn every_missing_step_of_captures_is_found_out() {
    for mutant in [Mutant::ForgetBefore, Mutant::ForgetOutside, Mutant::CaptureInPublic] {
        let caught = (0..3000).find(|&seed| program(seed, Some(mutant)) != 0);
        assert!(caught.is_some(), "{mutant:?} survived");
    }
}
