//! Every interleaving of a few threads on a tiny engine: nobody ever holds a slot that another holds, and
//! nothing is lost.

use std::sync::Arc;

use super::*;
use crate::engine::Span;
use loom::sync::atomic::AtomicUsize as Cell;

const BLOCK: usize = 64;
const BASE: usize = 1 << 40;

/// An engine with one span of `slots` slots, over addresses that nobody touches.
fn engine(slots: usize) -> Arc<AtomicSlots> {
    let engine = AtomicSlots::new(BLOCK, 16, 2).unwrap();
    let span = Span { start: BASE, len: slots * BLOCK, zeroed: false };
    // SAFETY: the engine only computes with the addresses.
    engine.with_slow(|slow| unsafe { slow.add(span) }).unwrap();
    Arc::new(engine)
}

/// Who holds each slot; loom reports it if two do.
fn holders(slots: usize) -> Arc<Vec<Cell>> {
    Arc::new((0..slots).map(|_| Cell::new(0)).collect())
}

fn hold(holders: &[Cell], start: usize) {
    let before = holders[(start - BASE) / BLOCK].swap(1, Ordering::Relaxed);
    assert_eq!(before, 0, "held twice");
}

fn release(engine: &AtomicSlots, holders: &[Cell], start: usize, thread: usize) {
    assert_eq!(holders[(start - BASE) / BLOCK].swap(0, Ordering::Relaxed), 1);
    // SAFETY: held until here.
    unsafe { engine.free_block(start, thread) };
}

fn model(test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(test);
}

#[test]
fn loom_two_threads_take_and_give() {
    model(|| {
        let (engine, held) = (engine(2), holders(2));
        let work = |thread: usize, engine: Arc<AtomicSlots>, held: Arc<Vec<Cell>>| {
            move || {
                for _ in 0..2 {
                    // Two slots and two threads with one each: there is always one.
                    let start = engine.alloc_one(thread).expect("one is free").start;
                    hold(&held, start);
                    release(&engine, &held, start, thread);
                }
            }
        };
        let other = loom::thread::spawn(work(1, engine.clone(), held.clone()));
        work(0, engine.clone(), held)();
        other.join().unwrap();
        engine.with_slow(|slow| {
            slow.check().unwrap();
            assert_eq!((slow.live_blocks(), slow.totals().allocs), (0, 4));
        });
    });
}

#[test]
fn loom_a_slot_given_back_is_found_again() {
    // A thread that finds its group empty takes it out of the summary while another gives a slot back.
    model(|| {
        let (engine, held) = (engine(1), holders(1));
        let start = engine.alloc_one(0).unwrap().start;
        hold(&held, start);
        let other = {
            let (engine, held) = (engine.clone(), held.clone());
            loom::thread::spawn(move || {
                if let Some(block) = engine.alloc_one(1) {
                    hold(&held, block.start);
                    release(&engine, &held, block.start, 1);
                }
            })
        };
        release(&engine, &held, start, 0);
        other.join().unwrap();
        // A thread that was never here has the summary alone to go by.
        engine.stripe(1).group.store(ptr::null_mut(), Ordering::Relaxed);
        assert!(engine.alloc_one(1).is_some(), "a free slot was lost");
    });
}

#[test]
fn loom_a_run_and_a_single_block() {
    model(|| {
        let (engine, held) = (engine(3), holders(3));
        let other = {
            let (engine, held) = (engine.clone(), held.clone());
            loom::thread::spawn(move || {
                let start = engine.alloc_one(1).expect("three slots for three").start;
                hold(&held, start);
                release(&engine, &held, start, 1);
            })
        };
        let two = Layout::from_size_align(2 * BLOCK, 1).unwrap();
        if let Some(run) = engine.with_slow(|slow| slow.alloc(two)) {
            hold(&held, run.start);
            hold(&held, run.start + BLOCK);
            assert_eq!(held[(run.start - BASE) / BLOCK + 1].swap(0, Ordering::Relaxed), 1);
            release(&engine, &held, run.start, 0);
        }
        other.join().unwrap();
        engine.with_slow(|slow| {
            slow.check().unwrap();
            assert_eq!(slow.live_blocks(), 0);
        });
    });
}

#[test]
fn loom_a_span_goes_while_others_allocate() {
    model(|| {
        let (engine, held) = (engine(1), holders(1));
        let other = {
            let (engine, held) = (engine.clone(), held.clone());
            loom::thread::spawn(move || {
                if let Some(block) = engine.alloc_one(1) {
                    hold(&held, block.start);
                    release(&engine, &held, block.start, 1);
                    return true;
                }
                false
            })
        };
        let removed = engine.with_slow(|slow| slow.remove_idle(usize::MAX));
        let served = other.join().unwrap();
        assert!(removed.is_some() || served, "only a block in use keeps a span");
        engine.with_slow(|slow| slow.check()).unwrap();
    });
}
