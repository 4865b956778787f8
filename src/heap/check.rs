//! The walk over every invariant of a thread's heap.

use super::class;
use super::segment::Segment;
use super::span::{Place, Span};
use super::thread::ThreadHeap;
use crate::engine::Broken;

impl ThreadHeap {
    /// Walks the invariants of `thread` and `segment` that concern this heap; its own thread only.
    pub(crate) fn check(&self) -> Result<(), Broken> {
        let mut live = 0;
        let mut pending = 0;
        let mut segments = 0;
        for segment in self.segments.iter() {
            let at = segment.base() as usize;
            let expect = |holds, invariant| expect(holds, at, invariant);
            segments += 1;
            expect(self.is(segment.head.owner.load(core::sync::atomic::Ordering::Relaxed)), "owner")?;
            expect(segment.roomy.get() == (segment.vacant.get() != 0), "roomy segments are listed")?;
            expect(segment.queued.get() == (segment.idle() != 0), "idle segments are listed")?;
            pending += segment.idle_bytes();
            let mut slices = 0;
            for span in segment.spans() {
                slices += u32::from(span.slices.get());
                self.check_span(segment, span)?;
                live += span.live() as usize * span.size.get() as usize;
                pending += span.unsettled();
            }
            expect(slices + segment.vacant.get().count_ones() == 64, "a slice has one span or is vacant")?;
        }
        let at = core::ptr::from_ref(self) as usize;
        expect(segments == self.segment_count.get(), at, "segments are counted")?;
        expect(live == self.live.get(), at, "live bytes are counted")?;
        expect(pending == self.pending.get(), at, "pending bytes are counted")?;
        for class in 0..class::COUNT {
            for block in self.cached(class) {
                let block = block.load(core::sync::atomic::Ordering::Relaxed);
                // SAFETY: cached blocks are live, so their segments are there.
                let segment = unsafe { &*super::segment_of(block) };
                let span = segment.span_at(block);
                let index = span.index_of(block) as usize;
                // Of a span of another thread only the frozen cells may be read.
                let own = self.is(segment.head.owner.load(core::sync::atomic::Ordering::Relaxed));
                let fits = span.class.get() as usize == class
                    && span.begins_block(block)
                    && !(own && span.is_free(index))
                    && !span.is_posted(index);
                expect(fits, block as usize, "cached blocks are live and of their class")?;
            }
        }
        Ok(())
    }

    fn check_span(&self, segment: &Segment, span: &Span) -> Result<(), Broken> {
        let at = span.base.get();
        let expect = |holds, invariant| expect(holds, at, invariant);
        expect(span.carved.get() <= span.capacity.get(), "carved <= capacity")?;
        let end = span.block(span.carved.get() as usize) as usize;
        expect(
            span.carved.get() == 0 || segment.touch(span, end) == 0,
            "carved blocks lie in no pristine slice",
        )?;
        expect(span.counted_free() == span.free_count.get(), "free bits are counted")?;
        expect(span.free_count.get() <= span.carved.get(), "free blocks are carved")?;
        expect(span.settled.get() <= span.free_count.get(), "settled <= free_count")?;
        expect(!span.doubly_free(), "no block is free and posted")?;
        expect(
            (0..span.slices.get())
                .all(|slice| segment.class_of[(span.first.get() + slice) as usize].get() == span.class.get()),
            "slices know their class",
        )?;
        if span.is_single() {
            return Ok(());
        }
        let bin = &self.bins[span.class.get() as usize];
        let listed = bin.partial.iter().any(|listed| core::ptr::eq(listed, span));
        expect(listed == (span.place.get() == Place::Partial), "partial spans are listed")?;
        expect(
            span.place.get() != Place::Full || span.free_count.get() == 0,
            "full spans have nothing free",
        )?;
        let current = core::ptr::eq(bin.current.get(), span);
        expect(current == (span.place.get() == Place::Current), "one span a class is current")?;
        let queued = self.queue.iter().any(|queued| core::ptr::eq(queued, span));
        expect(queued == span.queued.get(), "queued spans are in the queue")
    }
}

fn expect(holds: bool, at: usize, invariant: &'static str) -> Result<(), Broken> {
    if holds { Ok(()) } else { Err(Broken { invariant, at }) }
}
