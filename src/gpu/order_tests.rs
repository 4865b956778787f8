//! Ordering under thousands of schedules: random programs on the simulated device, which reports every block
//! that is reused while it may be in use. Then the same with one ordering step taken out at a time: each such
//! mutant must be found out.

use std::ptr::NonNull;
use std::sync::atomic::Ordering::Relaxed;

use super::driver::sim::{HazardKind, SimConfig, Touch};
use super::order::Mutant;
use super::{DevicePool, GpuDevice, Stream};
use crate::base::config::PoolConfig;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 11) % limit as u64) as usize
    }
}

struct Live {
    address: usize,
    bytes: usize,
    home: usize,
}

/// Where the pool's memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// Segments; blocks of some KiB.
    Segments,
    /// Pieces that move; the same blocks, a thousand times as large.
    Pieces,
}

/// One random program; returns how many hazards the device saw.
fn program(seed: u64, steps: usize, mutant: Option<Mutant>, from: From) -> usize {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let eagerness = [0, 8, 64, 200][random.below(4)];
    let scale = if from == From::Pieces { 1000 } else { 1 };
    let memory = (64 << 20) * scale;
    let gpu = GpuDevice::simulated(SimConfig::default().seed(seed).eagerness(eagerness).memory(memory));
    let sim = gpu.simulation().unwrap();
    let limit = ([64, 128, 256][random.below(3)] << 10) * scale;
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(limit)).unwrap();
    pool.inner.core.lock().order.mutant = mutant;
    pool.inner.front.one_for_all.store(mutant == Some(Mutant::OneCache), Relaxed);
    let mut streams: Vec<Stream> = (0..3).map(|_| gpu.new_stream().unwrap()).collect();
    streams.push(gpu.default_stream());
    let mut live: Vec<Live> = Vec::new();
    for _ in 0..steps {
        let at = random.below(streams.len());
        match random.below(20) {
            0..=7 => {
                let most = if random.below(4) == 0 { 60 << 10 } else { 6 << 10 };
                let bytes = 1 + random.below(most * scale);
                match pool.allocate_async(bytes, &streams[at]) {
                    Ok(block) => {
                        let address = block.as_ptr() as usize;
                        let touch = [Touch::write(address, bytes)];
                        sim.launch(&streams[at], 1000, &touch, |_| ()).unwrap();
                        live.push(Live { address, bytes, home: at });
                    }
                    Err(_) => live.drain(..).for_each(|block| free(&pool, &block, &streams)),
                }
            }
            8..=13 if !live.is_empty() => {
                let block = live.swap_remove(random.below(live.len()));
                free(&pool, &block, &streams);
            }
            14..=16 if !live.is_empty() => {
                // Work on another stream, ordered after the home stream's, and recorded.
                let block = &live[random.below(live.len())];
                let address = NonNull::new(block.address as *mut _).unwrap();
                for other in [at, (at + 1) % streams.len()] {
                    streams[other].wait_for(&streams[block.home]).unwrap();
                    let touch = [Touch::read(block.address, block.bytes)];
                    sim.launch(&streams[other], 1000, &touch, |_| ()).unwrap();
                    if pool.record_stream(address, &streams[other]).is_err() {
                        // Too many streams at once: then the work must be over before the free.
                        streams[other].synchronize().unwrap();
                    }
                }
            }
            17 if at < 3 => {
                live.extract_if(.., |block| block.home == at).for_each(|block| free(&pool, &block, &streams));
                streams[at] = gpu.new_stream().unwrap();
            }
            18 => {
                pool.process_deferred();
                pool.trim(if random.below(2) == 0 { 0 } else { usize::MAX }).unwrap();
            }
            19 if random.below(4) == 0 => streams[at].synchronize().unwrap(),
            _ => {}
        }
        pool.check().unwrap();
    }
    live.drain(..).for_each(|block| free(&pool, &block, &streams));
    assert!(!pool.has_leaks());
    drop(pool);
    sim.run_all();
    if mutant.is_none() {
        sim.hazards().iter().for_each(|hazard| eprintln!("seed {seed}: {hazard}"));
    }
    sim.hazards().len()
}

fn free(pool: &DevicePool, block: &Live, streams: &[Stream]) {
    let address = NonNull::new(block.address as *mut _).unwrap();
    // SAFETY: live, freed once, and all other streams that use it were recorded.
    unsafe { pool.try_deallocate_async(address, &streams[block.home]) }.unwrap();
}

/// How many seeds; `GPU_SCHEDULES` makes it more.
fn schedules() -> u64 {
    std::env::var("GPU_SCHEDULES").ok().and_then(|text| text.parse().ok()).unwrap_or(3000)
}

#[test]
fn no_schedule_reuses_a_block_in_use() {
    for seed in 0..schedules() {
        assert_eq!(program(seed, 120, None, From::Segments), 0, "seed {seed}");
        if seed % 2 == 0 {
            assert_eq!(program(seed, 100, None, From::Pieces), 0, "seed {seed}, pieces");
        }
    }
}

#[test]
fn every_missing_step_is_found_out() {
    let mutants = [
        Mutant::NoRecord,
        Mutant::NoWait,
        Mutant::AlwaysDone,
        Mutant::FirstEvent,
        Mutant::WaitedForOpen,
        Mutant::ForgetUsers,
        Mutant::OneUser,
        Mutant::NoSealAtClose,
        Mutant::KeepNumbers,
        Mutant::JoinUnderOldBatch,
        Mutant::CleanCaches,
        Mutant::OneCache,
        Mutant::MoveBusy,
    ];
    for mutant in mutants {
        let from = if mutant == Mutant::MoveBusy { From::Pieces } else { From::Segments };
        let caught = (0..schedules()).find(|&seed| program(seed, 200, Some(mutant), from) != 0);
        assert!(caught.is_some(), "{mutant:?} survived {} schedules", schedules());
    }
}

#[test]
fn memory_at_two_addresses_is_seen_as_one() {
    const UNIT: usize = 2 << 20;
    let gpu = GpuDevice::simulated(SimConfig::default().eagerness(0));
    let sim = gpu.simulation().unwrap();
    let driver = gpu.0.driver.clone();
    let (one, two) = (gpu.new_stream().unwrap(), gpu.new_stream().unwrap());
    let start = driver.reserve_va(2 * UNIT).unwrap();
    let handle = driver.create_handle(UNIT).unwrap();
    for at in [start, start + UNIT] {
        // SAFETY: just reserved, and nothing is mapped there.
        unsafe { driver.map(at, UNIT, handle) }.unwrap();
    }
    // SAFETY: both mappings.
    unsafe { driver.set_access(start, 2 * UNIT) }.unwrap();
    driver.block_taken(start, UNIT, Some(one.raw()));
    sim.launch(&one, 100, &[Touch::write(start + 4096, 64)], |_| {}).unwrap();
    driver.block_freed(start, UNIT);
    driver.block_taken(start + UNIT, 4096, Some(two.raw()));
    assert_eq!(sim.hazards().len(), 0, "other bytes");
    driver.block_taken(start + UNIT + 4096, 4096, Some(one.raw()));
    assert_eq!(sim.hazards().len(), 0, "the same stream");
    sim.launch(&one, 100, &[Touch::write(start + UNIT + 4096, 64)], |_| {}).unwrap();
    driver.block_taken(start, UNIT, Some(two.raw()));
    let kinds: Vec<HazardKind> = sim.hazards().iter().map(|hazard| hazard.kind).collect();
    assert_eq!(kinds, [HazardKind::ReusedInUse]);
    sim.run_all();
    // SAFETY: whole mappings, and all work is complete.
    unsafe { driver.unmap(start, 2 * UNIT) }.unwrap();
    // SAFETY: the handle is mapped nowhere, then nothing is mapped in the range.
    unsafe { driver.release_handle(handle).and_then(|()| driver.free_va(start, 2 * UNIT)) }.unwrap();
}
