//! Search trees over nodes that bring nothing but two links: treaps, and Cartesian trees, which are treaps
//! whose priority means something.
//!
//! 1. In-order, nodes ascend by `before`.
//! 2. No node stands above its parent by `above`.
//!
//! Both orders are total over the nodes of a tree, so its shape is determined by its contents. All operations
//! run from the root down, without recursion and without links to parents.

/// Orders and links of one tree, to look at. Nodes are named by `Id`.
pub(super) trait View {
    /// A node's name.
    type Id: Copy + Eq;
    /// No node.
    const NONE: Self::Id;

    /// The left (0) or right (1) child.
    fn child(&self, node: Self::Id, side: usize) -> Self::Id;
    /// Whether `a` comes before `b` in order.
    fn before(&self, a: Self::Id, b: Self::Id) -> bool;
    /// Whether `a` belongs nearer to the root than `b`.
    fn above(&self, a: Self::Id, b: Self::Id) -> bool;
}

/// A tree that can be changed.
pub(super) trait Tree: View {
    /// Sets a child.
    fn set_child(&mut self, node: Self::Id, side: usize, child: Self::Id);
}

/// A link of a tree: where a subtree hangs.
#[derive(Clone, Copy)]
struct Hook<I> {
    /// The node and side; the root where there is none.
    at: Option<(I, usize)>,
}

impl<I: Copy + Eq> Hook<I> {
    #[inline]
    fn hang<T: Tree<Id = I>>(&self, tree: &mut T, root: &mut I, subtree: I) {
        match self.at {
            Some((node, side)) => tree.set_child(node, side, subtree),
            None => *root = subtree,
        }
    }
}

/// Adds `node`, which is in no tree.
#[inline]
pub(super) fn insert<T: Tree>(tree: &mut T, root: &mut T::Id, node: T::Id) {
    let mut hook = Hook { at: None };
    let mut at = *root;
    while at != T::NONE && tree.above(at, node) {
        let side = usize::from(tree.before(at, node));
        hook = Hook { at: Some((at, side)) };
        at = tree.child(at, side);
    }
    hook.hang(tree, root, node);
    // What hung here is divided: all before `node` to its left, all behind it to its right. `open[side]` is
    // the link where the next piece of that side belongs.
    let mut open = [(node, 0), (node, 1)];
    while at != T::NONE {
        let side = usize::from(!tree.before(at, node));
        let (hook, to) = open[side];
        tree.set_child(hook, to, at);
        open[side] = (at, 1 - side);
        at = tree.child(at, 1 - side);
    }
    for (hook, to) in open {
        tree.set_child(hook, to, T::NONE);
    }
}

/// Takes `node`, which is in the tree, out of it.
#[inline]
pub(super) fn remove<T: Tree>(tree: &mut T, root: &mut T::Id, node: T::Id) {
    let mut hook = Hook { at: None };
    let mut at = *root;
    while at != node {
        debug_assert!(at != T::NONE, "a node to remove is in its tree");
        let side = usize::from(tree.before(at, node));
        hook = Hook { at: Some((at, side)) };
        at = tree.child(at, side);
    }
    unhook(tree, root, hook, node);
}

/// Takes the first node in order for which `at_least` holds out of the tree; it must hold for every node behind
/// one for which it holds.
#[inline]
pub(super) fn take_first<T: Tree>(
    tree: &mut T,
    root: &mut T::Id,
    at_least: impl Fn(&T, T::Id) -> bool,
) -> Option<T::Id> {
    let mut best = None;
    let mut hook = Hook { at: None };
    let mut at = *root;
    while at != T::NONE {
        if at_least(tree, at) {
            best = Some((at, hook));
            hook = Hook { at: Some((at, 0)) };
            at = tree.child(at, 0);
        } else {
            hook = Hook { at: Some((at, 1)) };
            at = tree.child(at, 1);
        }
    }
    let (node, hook) = best?;
    unhook(tree, root, hook, node);
    Some(node)
}

/// Hangs the children of `node` in its place.
#[inline]
fn unhook<T: Tree>(tree: &mut T, root: &mut T::Id, mut hook: Hook<T::Id>, node: T::Id) {
    let (mut left, mut right) = (tree.child(node, 0), tree.child(node, 1));
    while left != T::NONE && right != T::NONE {
        if tree.above(left, right) {
            hook.hang(tree, root, left);
            hook = Hook { at: Some((left, 1)) };
            left = tree.child(left, 1);
        } else {
            hook.hang(tree, root, right);
            hook = Hook { at: Some((right, 0)) };
            right = tree.child(right, 0);
        }
    }
    hook.hang(tree, root, if left == T::NONE { right } else { left });
}

/// The first node in order for which `at_least` holds; it must hold for every node behind one for which it
/// holds.
#[inline]
pub(super) fn first<T: View>(tree: &T, root: T::Id, at_least: impl Fn(&T, T::Id) -> bool) -> Option<T::Id> {
    let mut best = None;
    let mut at = root;
    while at != T::NONE {
        if at_least(tree, at) {
            best = Some(at);
            at = tree.child(at, 0);
        } else {
            at = tree.child(at, 1);
        }
    }
    best
}

/// The node behind `node` in order.
pub(super) fn after<T: View>(tree: &T, root: T::Id, node: T::Id) -> Option<T::Id> {
    first(tree, root, |tree, other| tree.before(node, other))
}

/// A scatter of `value` that serves as a priority: distinct values have distinct priorities.
#[inline]
pub(super) fn scatter(value: usize) -> u64 {
    let value = (value as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value ^ (value >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys 0..n; node 0 is `NONE`.
    struct Toy(Vec<[usize; 2]>);

    impl View for Toy {
        type Id = usize;
        const NONE: usize = 0;
        fn child(&self, node: usize, side: usize) -> usize {
            self.0[node][side]
        }
        fn before(&self, a: usize, b: usize) -> bool {
            a < b
        }
        fn above(&self, a: usize, b: usize) -> bool {
            scatter(a) > scatter(b)
        }
    }

    impl Tree for Toy {
        fn set_child(&mut self, node: usize, side: usize, child: usize) {
            self.0[node][side] = child;
        }
    }

    impl Toy {
        fn depth(&self, root: usize) -> usize {
            if root == 0 { 0 } else { 1 + self.depth(self.0[root][0]).max(self.depth(self.0[root][1])) }
        }
        fn keys(&self, root: usize) -> Vec<usize> {
            let mut keys = Vec::new();
            let mut at = first(self, root, |_, _| true);
            while let Some(key) = at {
                keys.push(key);
                at = after(self, root, key);
            }
            keys
        }
    }

    #[test]
    fn stays_ordered_and_shallow_whatever_the_order_of_insertion() {
        const N: usize = 1000;
        for step in [1, 7, 389] {
            let mut toy = Toy(vec![[0; 2]; N + 1]);
            let mut root = 0;
            for i in 0..N {
                insert(&mut toy, &mut root, i * step % N + 1);
            }
            assert!(toy.depth(root) < 40, "{}", toy.depth(root));
            assert_eq!(toy.keys(root), (1..=N).collect::<Vec<_>>());
            for key in (1..=N).filter(|key| key % 3 != 0) {
                remove(&mut toy, &mut root, key);
            }
            assert_eq!(toy.keys(root), (1..=N).filter(|key| key % 3 == 0).collect::<Vec<_>>());
            assert_eq!(first(&toy, root, |_, key| key >= 100), Some(102));
            assert_eq!(first(&toy, root, |_, key| key > N), None);
        }
    }
}
