//! Placement by each strategy, and what a split leaves.

use super::*;
use crate::base::policy::{FreeRange, Policy, Request};

const KIB: usize = 1 << 10;
const LANE: u16 = super::FIRST;

/// Holes of these sizes in KiB, lowest first, free for anybody, with live blocks between them.
fn holes(strategy: Strategy, sizes: &[usize]) -> (Ranges, Vec<u32>) {
    let mut ranges = Ranges::new(9, strategy, 512);
    let mut at = 1 << 30;
    let mut nodes = Vec::new();
    for &size in sizes {
        assert!(ranges.add(at, size * KIB, Tag::CLEAN));
        nodes.push(ranges.around_any(at));
        at += size * KIB * 2;
    }
    ranges.add_lane(LANE);
    (ranges, nodes)
}

impl Ranges {
    /// The node around an address, live or free.
    fn around_any(&self, address: usize) -> u32 {
        let mut found = NIL;
        self.for_each(&mut |range| {
            if (range.start..range.start + range.len).contains(&address) {
                found = range.node;
            }
        });
        found
    }
}

fn chosen(strategy: impl Into<Strategy>, sizes: &[usize], kib: usize) -> usize {
    let (ranges, nodes) = holes(strategy.into(), sizes);
    let node = ranges.choose(LANE, || false, ((kib * KIB) >> 9) as u32, 256).unwrap();
    sizes[nodes.iter().position(|&hole| hole == node).unwrap()]
}

#[derive(Debug)]
struct Largest;
impl Policy for Largest {
    fn name(&self) -> &str {
        "largest"
    }
    fn choose(&self, request: Request, free: &mut dyn Iterator<Item = FreeRange>) -> Option<FreeRange> {
        free.filter(|range| range.fits(request.size, request.align)).max_by_key(|range| range.len)
    }
}

/// Answers with what is no range.
#[derive(Debug)]
struct Liar;
impl Policy for Liar {
    fn name(&self) -> &str {
        "liar"
    }
    fn choose(&self, request: Request, free: &mut dyn Iterator<Item = FreeRange>) -> Option<FreeRange> {
        let range = free.next()?;
        Some(FreeRange { start: range.start + 512, len: request.size })
    }
}

#[test]
fn each_strategy_places_as_it_says() {
    let sizes = [64, 40, 33, 35, 1024];
    assert_eq!(chosen(Strategy::Segregated, &sizes, 32), 33);
    assert_eq!(chosen(Strategy::BestFit, &sizes, 32), 33);
    assert_eq!(chosen(Strategy::FirstFit, &sizes, 32), 64);
    assert_eq!(chosen(Strategy::FirstFit, &sizes, 65), 1024);
    assert_eq!(chosen(Largest, &sizes, 32), 1024);
    assert_eq!(chosen(Liar, &sizes, 34), 35, "no range that was shown: the tightest instead");
}

#[test]
fn best_fit_looks_at_every_range_of_a_bin() {
    // One bin spans 4 KiB here; the tightest is the last that was freed first.
    let sizes: Vec<usize> = [64].into_iter().chain(std::iter::repeat_n(67, 100)).collect();
    let (ranges, nodes) = holes(Strategy::BestFit, &sizes);
    assert_eq!(ranges.choose(LANE, || false, 128, 256), Some(nodes[0]));
    let (ranges, nodes) = holes(Strategy::Segregated, &sizes);
    assert_ne!(ranges.choose(LANE, || false, 128, 256), Some(nodes[0]), "a good fit, in bounded time");
}

#[test]
fn first_fit_weighs_own_and_common_ranges_by_address() {
    let (mut ranges, nodes) = holes(Strategy::FirstFit, &[64, 64, 64]);
    ranges.give(nodes[1], Tag { lane: LANE, batch: 1 });
    assert_eq!(ranges.choose(LANE, || false, 64, 256), Some(nodes[0]));
    assert_eq!(ranges.choose(LANE, || true, 64, 256), Some(nodes[1]), "a capture takes its own first");
    assert_eq!(ranges.choose(CLEAN, || false, 64, 256), Some(nodes[0]));
}

#[test]
fn a_split_leaves_no_less_than_the_least() {
    let mut ranges = Ranges::new(9, Strategy::Segregated, 8 * KIB);
    assert!(ranges.add(1 << 30, 64 * KIB, Tag::CLEAN));
    let mut cut = |kib: usize| {
        let granules = ((kib * KIB) >> 9) as u32;
        let node = ranges.choose(CLEAN, || false, granules, 512).unwrap();
        let node = ranges.carve(node, granules, 512, CLEAN).unwrap();
        ranges.check().unwrap();
        ranges.len(node) / KIB
    };
    assert_eq!(cut(32), 32);
    assert_eq!(cut(16), 16, "16 KiB are left, which is enough");
    assert_eq!(cut(9), 16, "7 KiB would be left, so they go with the block");
}

#[test]
fn the_segment_idle_for_longest_goes_first() {
    let mut ranges = Ranges::new(9, Strategy::Segregated, 512);
    let tag = Tag { lane: LANE, batch: 1 };
    let starts: Vec<usize> = (0..4).map(|at| (1 << 30) + at * 128 * KIB).collect();
    let blocks: Vec<[u32; 2]> = starts
        .iter()
        .map(|&start| {
            assert!(ranges.add(start, 64 * KIB, Tag::CLEAN));
            ranges.add_lane(LANE);
            [0, 1].map(|_| {
                let node = ranges.choose(CLEAN, || false, 64, 512).unwrap();
                ranges.carve(node, 64, 512, CLEAN).unwrap()
            })
        })
        .collect();
    // The halves of a segment are freed for different lanes, so the third is whole only when the lane's half
    // has become clean.
    for (at, lane) in [(2, tag), (1, Tag::CLEAN), (3, Tag::CLEAN), (0, Tag::CLEAN)] {
        ranges.free(blocks[at][0], Tag::CLEAN);
        ranges.free(blocks[at][1], lane);
    }
    ranges.retag(LANE, |_| true, Tag::CLEAN);
    ranges.check().unwrap();
    let order: Vec<usize> = (0..4).map(|_| ranges.remove_idle(usize::MAX, &|_| true).unwrap().0).collect();
    assert_eq!(order, [starts[1], starts[3], starts[0], starts[2]]);
}
