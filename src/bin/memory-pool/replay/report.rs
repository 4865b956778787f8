//! What a replay shows, as a table and as JSON.

use std::time::Duration;

use super::Held;

/// One round's time and calls.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) time: Duration,
    pub(super) source_calls: u64,
    /// Calls of the driver, and what they cost on the virtual clock.
    pub(super) driver: Option<(u64, u64)>,
}

/// One point of the curve.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) live: u64,
    pub(super) held: Held,
}

impl Sample {
    /// The part of the free bytes that lies outside the largest free range.
    fn fragmentation(&self) -> f64 {
        let Held { free, largest_free, .. } = self.held;
        if free == 0 { 0.0 } else { 1.0 - largest_free.min(free) as f64 / free as f64 }
    }
}

/// What a replay shows.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) pool: String,
    pub(super) place: String,
    pub(super) events: usize,
    pub(super) streams: usize,
    pub(super) peak_live: u64,
    /// In the first round.
    pub(super) peak_reserved: usize,
    /// Bytes that the books take at the end; they do not shrink.
    pub(super) books: Option<usize>,
    /// With an empty pool, and with what that left.
    pub(super) cold: Round,
    pub(super) warm: Round,
    /// Over the first round.
    pub(super) curve: Vec<Sample>,
}

impl Report {
    /// Nanoseconds an operation.
    fn each(&self, nanoseconds: u128) -> f64 {
        nanoseconds as f64 / self.events as f64
    }

    fn ratio(&self) -> f64 {
        self.peak_reserved as f64 / self.peak_live as f64
    }

    fn round(&self, name: &str, round: &Round) -> String {
        let mut line = format!(
            "{name:<13} {:>10.1} ns an operation, {} calls to the source",
            self.each(round.time.as_nanos()),
            round.source_calls
        );
        if let Some((calls, ns)) = round.driver {
            line +=
                &format!("; {calls} driver calls, {:.1} ns an operation on its clock", self.each(ns.into()));
        }
        line + "\n"
    }

    pub(super) fn table(&self) -> String {
        let gib = |bytes: f64| bytes / f64::from(1 << 30);
        let mut text = format!(
            "{} on {} operations, {} streams\n\
             place         {}\n\
             peak live     {:>10.3} GiB\n\
             peak reserved {:>10.3} GiB, {:.3} of the live\n",
            self.pool,
            self.events,
            self.streams,
            self.place,
            gib(self.peak_live as f64),
            gib(self.peak_reserved as f64),
            self.ratio(),
        );
        if let Some(books) = self.books {
            let part = 100.0 * books as f64 / self.peak_reserved.max(1) as f64;
            text +=
                &format!("books         {:>10.1} KiB, {part:.4} % of the reserved\n", books as f64 / 1024.0);
        }
        text += &self.round("cold", &self.cold);
        text += &self.round("warm", &self.warm);
        text += "\nreserved (.) and live (#) over the first round, in sixtieths of the peak reserved; at the end of a \
                 line what part of the free bytes lies outside the largest free range\n";
        let scale = |bytes: f64| (bytes * 60.0 / self.peak_reserved.max(1) as f64).round() as usize;
        // Every other sample makes a screenful.
        for sample in self.curve.iter().step_by(2) {
            let (live, reserved) = (scale(sample.live as f64), scale(sample.held.reserved as f64));
            let bar = format!("{}{}", "#".repeat(live), ".".repeat(reserved.saturating_sub(live)));
            text += &format!("{bar:<62} {:.2}\n", sample.fragmentation());
        }
        text
    }

    pub(super) fn json(&self) -> String {
        let round = |name: &str, round: &Round| {
            let mut fields = format!(
                "\"{name}_ns\":{:.1},\"{name}_source_calls\":{}",
                self.each(round.time.as_nanos()),
                round.source_calls
            );
            if let Some((calls, ns)) = round.driver {
                let each = self.each(ns.into());
                fields += &format!(",\"{name}_driver_calls\":{calls},\"{name}_driver_ns\":{each:.1}");
            }
            fields
        };
        let books = self.books.map_or(String::new(), |books| format!("\"books\":{books},"));
        let curve: Vec<String> = self
            .curve
            .iter()
            .map(|sample| format!("[{},{},{:.3}]", sample.live, sample.held.reserved, sample.fragmentation()))
            .collect();
        format!(
            "{{\"pool\":\"{}\",\"place\":\"{}\",\"operations\":{},\"streams\":{},\"peak_live\":{},\
             \"peak_reserved\":{},\"reserved_over_live\":{:.4},{books}{},{},\"live_reserved_fragmentation\":[{}]}}\n",
            self.pool,
            self.place.replace(['"', '\\'], ""),
            self.events,
            self.streams,
            self.peak_live,
            self.peak_reserved,
            self.ratio(),
            round("cold", &self.cold),
            round("warm", &self.warm),
            curve.join(","),
        )
    }
}
