//! Lists threaded through the nodes themselves, so that linking allocates nothing.
//!
//! A list belongs to whoever owns its nodes (one thread, or the holder of a lock). All zero is an empty list
//! and an unlinked node.

use core::cell::Cell;
use core::marker::PhantomData;
use core::ptr;

/// A node's place in one list.
pub(crate) struct Links<T> {
    next: Cell<*const T>,
    prev: Cell<*const T>,
}

/// Names one of the lists a node can be on.
pub(crate) trait Chain {
    type Node;
    fn links(node: &Self::Node) -> &Links<Self::Node>;
}

/// A doubly linked list of nodes that outlive it.
pub(crate) struct List<C: Chain> {
    head: Cell<*const C::Node>,
    tail: Cell<*const C::Node>,
    chain: PhantomData<C>,
}

impl<C: Chain> List<C> {
    pub(crate) const fn new() -> Self {
        Self { head: Cell::new(ptr::null()), tail: Cell::new(ptr::null()), chain: PhantomData }
    }

    /// Forgets all nodes; their links are stale until they are pushed again.
    pub(crate) fn clear(&self) {
        self.head.set(ptr::null());
        self.tail.set(ptr::null());
    }

    pub(crate) fn front(&self) -> Option<&C::Node> {
        // SAFETY: nodes outlive the lists they are on (contract of this type).
        unsafe { self.head.get().as_ref() }
    }

    pub(crate) fn after(&self, node: &C::Node) -> Option<&C::Node> {
        // SAFETY: as above.
        unsafe { C::links(node).next.get().as_ref() }
    }

    pub(crate) fn push_front(&self, node: &C::Node) {
        let links = C::links(node);
        let head = self.head.replace(node);
        links.next.set(head);
        links.prev.set(ptr::null());
        // SAFETY: as above.
        match unsafe { head.as_ref() } {
            Some(head) => C::links(head).prev.set(node),
            None => self.tail.set(node),
        }
    }

    pub(crate) fn push_back(&self, node: &C::Node) {
        let links = C::links(node);
        let tail = self.tail.replace(node);
        links.prev.set(tail);
        links.next.set(ptr::null());
        // SAFETY: as above.
        match unsafe { tail.as_ref() } {
            Some(tail) => C::links(tail).next.set(node),
            None => self.head.set(node),
        }
    }

    /// Unlinks a node that is on this list.
    pub(crate) fn remove(&self, node: &C::Node) {
        let links = C::links(node);
        let (next, prev) = (links.next.replace(ptr::null()), links.prev.replace(ptr::null()));
        // SAFETY: as above, for both neighbours.
        unsafe {
            match next.as_ref() {
                Some(next) => C::links(next).prev.set(prev),
                None => self.tail.set(prev),
            }
            match prev.as_ref() {
                Some(prev) => C::links(prev).next.set(next),
                None => self.head.set(next),
            }
        }
    }

    pub(crate) fn pop_front(&self) -> Option<&C::Node> {
        let node = self.front()?;
        self.remove(node);
        Some(node)
    }

    /// The nodes, first to last; the node visited may be unlinked meanwhile.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &C::Node> {
        let mut at = self.front();
        core::iter::from_fn(move || {
            let node = at?;
            at = self.after(node);
            Some(node)
        })
    }
}
